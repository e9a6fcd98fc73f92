// Attention of one new token per sequence over a paged KV cache, the append of its k and v fused in (flash
// decoding).
//
// Template parameters:
//   T         __half or __nv_bfloat16
//   kHeadDim  64, 80, 96 or 128
//   kWarps    warps per block; every warp runs its own copy pipeline and meets the others only at the end
//   kStages   tiles of 16 tokens in flight per warp
//   kCluster  true: the splits of one sequence form a thread block cluster and combine through distributed
//   shared memory
//             (sm_90 and later, at most 8 splits); false: they combine through `partial` in global memory,
//             the last one to arrive doing the work
//   C         what the cache holds: T, or E4m3: k and v are rounded to it, the new token's as well, and become T again on
//             the way from shared memory to the tensor cores
//
// Grid (kv heads x blocks of 8 query heads, sequences, splits). Tiles of 16 tokens are dealt in turn to the
// warps of all splits, so that a warp can look up the pages of its tiles before it knows the length. Tensor
// cores compute S^T = K Q^T and O^T = V^T P^T: keys are the 16 rows of mma.m16n8k16 and up to 8 query heads
// of one kv head its 8 columns, so that grouped queries cost nothing extra. Splits and warps are combined in
// a fixed order: equal inputs give equal bits.

#include "common/async.cuh"
#include "common/cluster.cuh"
#include "common/fp8.cuh"
#include "common/paged.cuh"
#include "common/softmax_tiles.cuh"
#include "common/tensor_copy.cuh"

namespace trtc {

constexpr int kTile = 16;              // tokens a warp handles at a time
constexpr int kHeads = 8;              // query heads a block handles: columns of the mma
constexpr float kRescaleSlack = 8.0f;  // log2: sums may grow 2^8-fold before they are rescaled

// Shared memory of one warp: stages of a tile of k, then a tile of v.
template <int kHeadDim, typename C>
struct Layout {
    static_assert(kHeadDim % 16 == 0 && kHeadDim <= 128,
                  "a lane copies at most one 16-byte piece of a new row");
    static constexpr bool kPacked = sizeof(C) == 1;
    static constexpr int kPiece = 16 / sizeof(C);       // elements of 16 bytes
    static constexpr int kChunks = kHeadDim / kPiece;   // 16-byte pieces of a row of k or v
    static constexpr int kNewChunks = kHeadDim / 8;     // pieces of a new row, whose elements have 16 bits
    static constexpr int kRowBytes =
        (kChunks | 1) * 16;  // an odd number of pieces: ldmatrix meets no bank twice
    static constexpr int kTileBytes = kTile * kRowBytes;
    static constexpr int kStageBytes = 2 * kTileBytes;
    static constexpr int kCopies = (kTile * kChunks + 31) / 32;  // 16-byte copies per lane for one tile of k
    static constexpr int kSteps = kHeadDim / 16;                 // mma steps along head_dim
    // A step's 16 dims in the order in which fragments hold them: of k and q the first pair of a lane is at kPair * (lane % 4),
    // the other kHalf further; of the output, the first row of a lane is at kRow * (lane / 4), the other kOther further.
    static constexpr int kPair = kPacked ? 4 : 2, kHalf = kPacked ? 2 : 8;
    static constexpr int kRow = kPacked ? 2 : 1, kOther = kPacked ? 1 : 8;
};

// Over the 8 lanes that hold the same query heads (lane % 4 is equal).
__device__ __forceinline__ float column_max(float value) {
#pragma unroll
    for (int distance = 4; distance < 32; distance *= 2)
        value = fmaxf(value, __shfl_xor_sync(~0u, value, distance));
    return value;
}

__device__ __forceinline__ float column_sum(float value) {
#pragma unroll
    for (int distance = 4; distance < 32; distance *= 2) value += __shfl_xor_sync(~0u, value, distance);
    return value;
}

// exp2(maximum - reference) where both may be -infinity: a part without tokens weighs nothing.
__device__ __forceinline__ float weight_of(float maximum, float reference) {
    return maximum == -kInfinity ? 0.0f : exp2_approximate(maximum - reference);
}

// Fragments of 16 tokens by the 16 dims of mma steps `step` and `step + 1`, if there is that, from a tile of e4m3 numbers: a 16-byte
// piece of a row has the dims of one step. `row` points to the piece of step 0, or 1, of the lane's token: lanes 16... have the latter.
// ldmatrix takes two numbers for one of 16 bits, so that a lane gets four neighbouring dims of a token; transposed, two
// neighbouring dims of two neighbouring tokens.
template <typename T, int kSteps, bool kTransposed, typename Use>
__device__ __forceinline__ void packed_fragments(uint32 row, Use use) {
#pragma unroll
    for (int step = 0; step < kSteps; step += 2) {
        uint32 raw[4];
        if (step + 1 < kSteps) {
            kTransposed ? load_matrices_transposed(raw, row + step * 16) : load_matrices(raw, row + step * 16);
        } else {
            kTransposed ? load_two_matrices_transposed(raw, row + step * 16)
                        : load_two_matrices(raw, row + step * 16);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if (step + i >= kSteps) break;
            uint32 first = raw[2 * i], second = raw[2 * i + 1];  // tokens 0 to 7, 8 to 15
            if (kTransposed) {  // bytes (token, dim): 00 01 10 11 -> 00 10 01 11
                first = __byte_perm(first, 0, 0x3120);
                second = __byte_perm(second, 0, 0x3120);
            }
            using Pair = Fp8Pair<T>;
            const uint32 low[2] = {Pair::template of<false>(first), Pair::template of<false>(second)};
            const uint32 high[2] = {Pair::template of<true>(first), Pair::template of<true>(second)};
            use(step + i, low, high);
        }
    }
}

// Running softmax of one warp: for the query heads 2 * (lane % 4) and the next, in the mma's accumulator
// layout.
template <typename T, int kHeadDim, typename C>
struct Accumulator {
    static constexpr int kSteps = Layout<kHeadDim, C>::kSteps;
    static constexpr int kRowBytes = Layout<kHeadDim, C>::kRowBytes;

    float maximum[2] = {-kInfinity, -kInfinity};  // of scale * log2(e) * q.k
    float sum[2] = {0.0f, 0.0f};                  // this lane's tokens only, summed over lanes at the end
    float output[kSteps][4] = {};                 // two dims of each 16 (see Layout), two heads each

    __device__ __forceinline__ void rescale(const float (&candidate)[2]) {
#pragma unroll
        for (int head = 0; head < 2; ++head) {
            const float raised = fmaxf(maximum[head], column_max(candidate[head]));
            const float factor = exp2_approximate(maximum[head] - raised);
            maximum[head] = raised;
            sum[head] *= factor;
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
                output[step][head] *= factor;
                output[step][head + 2] *= factor;
            }
        }
    }

    // One tile; tokens at and after `visible` are masked (their v is zero).
    __device__ __forceinline__ void add_tile(unsigned k_tile, unsigned v_tile,
                                             const uint32 (&query)[kSteps][2], float scale_log2, int visible,
                                             int lane) {
        float score[2][4] = {};  // two chains of dependent mma instead of one
        const uint32 k_row = k_tile + (lane & 15) * kRowBytes + (lane >> 4) * 16;
        if constexpr (Layout<kHeadDim, C>::kPacked) {
            packed_fragments<T, kSteps, false>(k_row, [&](int step, const uint32(&low)[2], const uint32(&high)[2]) {
                mma_16x8x16<T>(score[step & 1], low[0], low[1], high[0], high[1], query[step][0], query[step][1]);
            });
        } else {
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
                uint32 keys[4];
                load_matrices(keys, k_row + step * 32);
                mma_16x8x16<T>(score[step & 1], keys[0], keys[1], keys[2], keys[3], query[step][0],
                               query[step][1]);
            }
        }
        const int token = lane >> 2;
        float p[4];  // token, token + 8; two heads each
#pragma unroll
        for (int i = 0; i < 4; ++i)
            p[i] = token + (i >> 1) * 8 < visible ? (score[0][i] + score[1][i]) * scale_log2 : -kInfinity;
        const float candidate[2] = {fmaxf(p[0], p[2]), fmaxf(p[1], p[3])};
        const bool grew =
            candidate[0] > maximum[0] + kRescaleSlack || candidate[1] > maximum[1] + kRescaleSlack;
        if (__any_sync(~0u, grew)) rescale(candidate);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            p[i] = exp2_approximate(p[i] - maximum[i & 1]);
            sum[i & 1] += p[i];
        }
        const uint32 first = transpose_matrix(pack_pair<T>(p[0], p[1]));
        const uint32 second = transpose_matrix(pack_pair<T>(p[2], p[3]));
        if constexpr (Layout<kHeadDim, C>::kPacked) {
            const uint32 v_row = v_tile + (lane & 15) * kRowBytes + (lane >> 4) * 16;
            packed_fragments<T, kSteps, true>(v_row, [&](int step, const uint32(&low)[2], const uint32(&high)[2]) {
                mma_16x8x16<T>(output[step], low[0], high[0], low[1], high[1], first, second);
            });
        } else {
            const uint32 v_row = v_tile + ((lane & 7) + (lane >> 4) * 8) * kRowBytes + ((lane >> 3) & 1) * 16;
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
                uint32 values[4];
                load_matrices_transposed(values, v_row + step * 32);
                mma_16x8x16<T>(output[step], values[0], values[1], values[2], values[3], first, second);
            }
        }
    }
};

// What one part (a warp or a split) contributes for `heads` query heads: rows of kHeadDim outputs, then
// maxima, then sums, all float32.
template <int kHeadDim>
__device__ constexpr int part_floats(int heads) {
    return heads * (kHeadDim + 2);
}

// Sum of `parts` parts for one (head, dim), relative to the largest maximum. Loads go through `load(part,
// index)`, many at a time: parts without tokens hold zeros and weigh nothing.
template <int kHeadDim, typename Load>
__device__ __forceinline__ void combine(int parts, int heads, int head, int dim, Load load, float& output,
                                        float& maximum, float& sum) {
    maximum = -kInfinity;
#pragma unroll 8
    for (int part = 0; part < parts; ++part) maximum = fmaxf(maximum, load(part, heads * kHeadDim + head));
    output = 0.0f;
    sum = 0.0f;
#pragma unroll 8
    for (int part = 0; part < parts; ++part) {
        const float weight = weight_of(load(part, heads * kHeadDim + head), maximum);
        output += weight * load(part, head * kHeadDim + dim);
        sum += weight * load(part, heads * (kHeadDim + 1) + head);
    }
}

// q, k, v, out: rows per sequence, `*_stride` elements apart. k_cache, v_cache: [num_pages, num_kv_heads,
// page_size, kHeadDim]. page_table: [sequences, pages_per_sequence]. kv_length: the new token included; 0
// marks an unused row, whose output is set to zero and whose q, k, v are not read. partial: [grid x * grid y,
// splits, part_floats(heads)], counters: [grid x * grid y], zero before the first launch and after each; both
// only used without kCluster and with splits > 1. early: kv_length, page_table and the cached rows of earlier
// tokens are read before waiting for the preceding grid.
template <typename T, int kHeadDim, int kWarps, int kStages, bool kCluster, typename C = T>
__global__ void __launch_bounds__(kWarps * 32)
    paged_decode_attention(const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ v,
                           C* k_cache, C* v_cache, const int* __restrict__ page_table,
                           const int* __restrict__ kv_length, T* __restrict__ out, float* partial,
                           unsigned* counters, int q_stride, int k_stride, int v_stride, int out_stride,
                           int num_kv_heads, int group, int page_shift, int pages_per_sequence,
                           float scale_log2, int early) {
    using L = Layout<kHeadDim, C>;
    using NewPiece = Eight<T, C>;
    constexpr int kThreads = kWarps * 32;
    extern __shared__ __align__(16) unsigned char shared[];
    const int lane = threadIdx.x & 31;
    const int warp = threadIdx.x >> 5;
    const int head_blocks = (group + kHeads - 1) / kHeads;
    const int kv_head = blockIdx.x / head_blocks;
    const int first_in_group = (blockIdx.x % head_blocks) * kHeads;
    const int first_head = kv_head * group + first_in_group;
    const int heads = min(kHeads, group - first_in_group);
    const int sequence = blockIdx.y;
    const int split = blockIdx.z;
    const int splits = gridDim.z;
    allow_dependents();  // at once: they are given room only when every block of this grid has its own
    const int floats = part_floats<kHeadDim>(heads);
    __shared__ __align__(8) uint64 parts_full;  // of the first split: counts the bytes of all parts
    if constexpr (kCluster) {
        if (threadIdx.x == 0) {
            barrier_init(shared_address(&parts_full), 1);
            barrier_init_fence();
            barrier_expect(shared_address(&parts_full), splits * floats * sizeof(float));
        }
        cluster_arrive_relaxed();  // "I run": waited for before anything is sent to another block
    }
    if (!early) wait_for_predecessors();

    // Tile `index` of this warp. A tile never crosses a page, so that it is one piece of memory.
    const auto tile_at = [&](int index) { return (index * splits + split) * kWarps + warp; };
    const int* const pages = page_table + static_cast<long long>(sequence) * pages_per_sequence;
    const auto page_of = [&](int index) {
        const int entry = tile_at(index) * kTile >> page_shift;
        return entry < pages_per_sequence ? __ldcg(pages + entry) : 0;
    };
    int page_ids =
        page_of(lane);  // lane i holds the page of tile i, later those of tiles 32 + i, 64 + i, ...
    const int length = __ldcg(kv_length + sequence);
    T* const out_row = out + static_cast<long long>(sequence) * out_stride + first_head * kHeadDim;
    if (length <= 0) {
        wait_for_predecessors();
        if (split == 0)
            for (int i = threadIdx.x; i < heads * kHeadDim; i += kThreads) out_row[i] = from_float<T>(0.0f);
        if constexpr (kCluster) cluster_wait();
        return;
    }
    const int tiles = (length + kTile - 1) / kTile;
    const int own_tiles = max(0, (tiles - tile_at(0) + splits * kWarps - 1) / (splits * kWarps));
    const HeadRows<kHeadDim> rows(num_kv_heads, kv_head, page_shift);
    const uint32 stages = shared_address(shared) + warp * (kStages * L::kStageBytes);

    const auto fetch = [&](int index) {
        if (index < own_tiles) {
            if (index > 0 && (index & 31) == 0) page_ids = page_of(index + lane);
            const int page = __shfl_sync(~0u, page_ids, index & 31);
            const int start = tile_at(index) * kTile;
            const long long offset = rows.offset(page, start) + lane * L::kPiece;
            // From this lane's first piece on; the new token is not in the cache yet.
            const int cached = (length - 1 - start) * L::kChunks - lane;
            const uint32 stage = stages + (index % kStages) * L::kStageBytes;
#pragma unroll
            for (int i = 0; i < L::kCopies; ++i) {
                const int piece = lane + 32 * i;
                if (kTile * L::kChunks % 32 != 0 && piece >= kTile * L::kChunks) break;
                const long long source = offset + i * 32 * L::kPiece;
                const uint32 target = stage + piece / L::kChunks * L::kRowBytes + piece % L::kChunks * 16;
                stream_async_16(target, k_cache + source, 32 * i < cached);
                stream_async_16(target + L::kTileBytes, v_cache + source, 32 * i < cached);
            }
        }
        copy_async_commit();
    };
#pragma unroll
    for (int index = 0; index < kStages; ++index) fetch(index);
    if (early) wait_for_predecessors();

    uint32 query[L::kSteps][2];  // mma B fragments: column lane / 4 is a query head
    {
        const int head = lane >> 2;
        const T* const row =
            q + static_cast<long long>(sequence) * q_stride + (first_head + head) * kHeadDim + (lane & 3) * L::kPair;
#pragma unroll
        for (int step = 0; step < L::kSteps; ++step)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                query[step][half] =
                    head < heads ? __ldcg(reinterpret_cast<const uint32*>(row + step * 16 + half * L::kHalf)) : 0u;
    }
    // The warp of the last tile adds the new token to it: lanes 0... hold its k, lanes 16... its v.
    const bool has_new = own_tiles > 0 && tile_at(own_tiles - 1) == tiles - 1;
    typename NewPiece::Stored fresh;
    if (has_new && (lane & 15) < L::kNewChunks) {
        const bool is_k = lane < 16;
        const int chunk = lane & 15;
        const T* const source = (is_k ? k + static_cast<long long>(sequence) * k_stride
                                      : v + static_cast<long long>(sequence) * v_stride) +
                                kv_head * kHeadDim + chunk * 8;
        fresh = NewPiece::store(__ldcg(reinterpret_cast<const uint4*>(source)));
        if (first_in_group == 0) {
            const int position = length - 1;
            C* const target =
                (is_k ? k_cache : v_cache) + rows.offset(pages[position >> page_shift], position) + chunk * 8;
            *reinterpret_cast<typename NewPiece::Stored*>(target) = fresh;
        }
    }

    Accumulator<T, kHeadDim, C> accumulator;
    for (int index = 0; index < own_tiles; ++index) {
        copy_async_wait<kStages - 1>();
        __syncwarp();  // every lane's copies of this tile have landed
        const int stage = (warp * kStages + index % kStages) * L::kStageBytes;
        const int visible = length - tile_at(index) * kTile;
        if (has_new && index == own_tiles - 1) {
            if ((lane & 15) < L::kNewChunks) {
                unsigned char* const row =
                    shared + stage + (visible - 1) * L::kRowBytes + (lane & 15) * sizeof(fresh);
                *reinterpret_cast<typename NewPiece::Stored*>(row + (lane >> 4) * L::kTileBytes) = fresh;
            }
            __syncwarp();
        }
        const uint32 k_tile = shared_address(shared) + stage;
        accumulator.add_tile(k_tile, k_tile + L::kTileBytes, query, scale_log2, visible, lane);
        __syncwarp();  // every lane is done with this tile: its stage is free
        fetch(index + kStages);
    }
    copy_async_wait<0>();
    __syncthreads();  // all stages are free: the warps meet in the same memory

    float* const warp_parts = reinterpret_cast<float*>(shared);
    {
        float* const part = warp_parts + warp * floats;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int head = (lane & 3) * 2 + i;
            const float sum = column_sum(accumulator.sum[i]);
            if (head < heads) {
#pragma unroll
                for (int step = 0; step < L::kSteps; ++step) {
                    float* const dims = part + head * kHeadDim + step * 16 + (lane >> 2) * L::kRow;
                    dims[0] = accumulator.output[step][i];
                    dims[L::kOther] = accumulator.output[step][i + 2];
                }
                if (lane < 4) {
                    part[heads * kHeadDim + head] = accumulator.maximum[i];
                    part[heads * (kHeadDim + 1) + head] = sum;
                }
            }
        }
    }
    __syncthreads();

    const int block_row = sequence * gridDim.x + blockIdx.x;
    float* split_parts;
    if constexpr (kCluster) {
        split_parts = reinterpret_cast<float*>(shared + kWarps * kStages * L::kStageBytes);
        cluster_wait();
    } else {
        split_parts =
            partial + static_cast<long long>(block_row) * splits * part_floats<kHeadDim>(min(kHeads, group));
    }
    const auto hand_over = [&](int at, float value) {
        float* const place = split_parts + split * floats + at;
        if constexpr (kCluster) {
            send_to_rank(shared_address(place), value, shared_address(&parts_full), 0);
        } else {
            *place = value;
        }
    };
    for (int i = threadIdx.x; i < heads * kHeadDim; i += kThreads) {
        const int head = i / kHeadDim;
        const int dim = i % kHeadDim;
        float output, maximum, sum;
        combine<kHeadDim>(
            kWarps, heads, head, dim, [&](int part, int at) { return warp_parts[part * floats + at]; },
            output, maximum, sum);
        if (splits == 1) {
            out_row[i] = from_float<T>(output / sum);
            continue;
        }
        hand_over(i, output);
        if (dim == 0) {
            hand_over(heads * kHeadDim + head, maximum);
            hand_over(heads * (kHeadDim + 1) + head, sum);
        }
    }
    if (splits == 1) return;
    if constexpr (kCluster) {
        // What was sent needs its sender no more; a cluster barrier would wait until all writes of a block are visible.
        if (split != 0) return;
        barrier_wait_cluster(shared_address(&parts_full), 0);
    } else {
        __shared__ bool is_last;
        __threadfence();  // each thread's part is visible before the block is counted
        __syncthreads();
        if (threadIdx.x == 0) {
            is_last =
                atomicInc(counters + block_row, splits - 1) == splits - 1;  // wraps to 0 for the next launch
            __threadfence();
        }
        __syncthreads();
        if (!is_last) return;
    }
    const auto load = [&](int part, int at) {
        const float* const address = split_parts + part * floats + at;
        return kCluster ? *address : __ldcg(address);
    };
    for (int i = threadIdx.x; i < heads * kHeadDim; i += kThreads) {
        float output, maximum, sum;
        combine<kHeadDim>(splits, heads, i / kHeadDim, i % kHeadDim, load, output, maximum, sum);
        out_row[i] = from_float<T>(output / sum);
    }
}

}  // namespace trtc
