// Causal attention of packed prompts (or chunks of them) on Hopper, for batches that fill the GPU: compile for sm_90a.
//
// The same function as context_attention.cu with float32 sums, see there. Blocks stay: each takes a piece of work (64 *
// kGroups query rows of one head) after the other, from a counter, for pieces differ. One warpgroup copies, running ahead
// of the others, also into the next piece of work; the others multiply, 64 rows each, the softmax of a tile while the
// tensor cores are busy with the values of the tile before. Template parameters:
//   T              __half or __nv_bfloat16
//   kHeadDim       64, 80, 96 or 128
//   kGroups        warpgroups that multiply
//   kKeys          keys of a tile: 64 or 128
//   kStages        tiles in shared memory
//   kQueryBuffers  pieces whose query rows are there
//
// Keys are counted by their position in the sequence: those below `past` come from the cache, the others from k and v,
// which the copying threads write to the cache on the way. Rows beyond the sequence are zeros in shared memory, for 0
// times what lies there need not be 0.

#include "common/async.cuh"
#include "common/softmax_tiles.cuh"
#include "common/tensor_copy.cuh"
#include "common/wgmma.cuh"
#include "context_attention/block.cuh"
#include "context_attention/panels.cuh"

namespace trtc {

constexpr int kGroupThreads = 128;
constexpr int kGroupWarps = 4;
constexpr int kGroupRows = 64;
constexpr float kRescaleSlack = 8.0f;  // log2: probabilities may reach 2^8 before sums are rescaled

// Registers of a thread that multiplies and of one that copies: all of the multiprocessor's together.
template <int kGroups>
constexpr int kMultiplierRegisters = kGroups == 3 ? 152 : kGroups == 2 ? 224 : 200;
constexpr int kCopierRegisters = 56;

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

// The value that all lanes have, known as such to the compiler: what follows from it needs no vector instructions.
__device__ __forceinline__ uint32 uniform(uint32 value) { return __shfl_sync(~0u, value, 0); }

// What the multiplying warps have to know of a piece of work; comes with its first tile. tiles: 0 at the end of all.
struct Work {
    int tiles;
    int first_row;    // counted within the sequence's new tokens
    int first_token;  // packed row of the sequence's first new token
    int new_tokens;
    int past;
    int head;
};

// New keys and values of a tile that are to be written to the cache: those at positions from `from` to before `to`.
struct Append {
    const int* pages;  // of the sequence
    int first;         // position of the tile's first key
    int from, to;
    int head_row;  // the first of the head in a page
};

// Lane m of four gets word m of each: of lane j in value[j].
__device__ __forceinline__ void transpose_quad(uint32 (&value)[4], int member) {
    const bool odd = member & 1, upper = member & 2;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        const uint32 other = __shfl_xor_sync(~0u, odd ? value[i] : value[i + 1], 1);
        (odd ? value[i] : value[i + 1]) = other;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const uint32 other = __shfl_xor_sync(~0u, upper ? value[i] : value[i + 2], 2);
        (upper ? value[i] : value[i + 2]) = other;
    }
}

// q, k, v, out, the caches and tables: as in context_attention.cu. counters: two zeros, which are zeros again afterwards.
// pieces: of work, query heads times slots.
template <typename T, int kHeadDim, int kGroups, int kKeys, int kStages, int kQueryBuffers>
__global__ void __launch_bounds__((kGroups + 1) * kGroupThreads, kGroups == 1 ? 2 : 1)
    context_attention_persistent(const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ v,
                                 T* k_cache, T* v_cache, const int* __restrict__ query_start,
                                 const int* __restrict__ kv_length, const int* __restrict__ page_table,
                                 T* __restrict__ out, int* counters, int q_stride, int k_stride, int v_stride, int out_stride,
                                 int sequences, int num_kv_heads, int group, int page_shift,
                                 int pages_per_sequence, float scale_log2, int append, int pieces) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    static_assert(kStages >= 3, "a tile in use, one before it, one on its way");
    constexpr int kRows = kGroups * kGroupRows;
    using Queries = Panels<kHeadDim, kRows>;
    using Keys = Panels<kHeadDim, kKeys>;
    constexpr int kRingStart = kQueryBuffers * Queries::kBytes;
    constexpr int kStageBytes = 2 * Keys::kBytes;  // k, then v
    constexpr int kChunks = kHeadDim / 8;
    constexpr int kRest = kHeadDim - 64;
    extern __shared__ __align__(1024) unsigned char shared[];
    __shared__ __align__(8) uint64 full[kStages], empty[kStages], queries_empty[kQueryBuffers];
    __shared__ Work work[kStages];
    __shared__ Append appends[kGroupWarps][kStages];
    __shared__ int next_piece[2];
    const int lane = threadIdx.x & 31;
    const int warp = threadIdx.x >> 5;
    const uint32 query_area = shared_address(shared);
    const uint32 stages = query_area + kRingStart;
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < kStages; ++stage) {
            // What threads have copied, and what one of them says of it.
            barrier_init(shared_address(full + stage), kGroupThreads + 1);
            barrier_init(shared_address(empty + stage), kGroups * kGroupWarps);
        }
        for (uint64& barrier : queries_empty) barrier_init(shared_address(&barrier), kGroups * kGroupThreads);
        barrier_init_fence();
    }
    __syncthreads();
    allow_dependents();
    int stage = 0, parity = 0, buffer = 0;
    const auto advance = [&] {
        if (++stage == kStages) stage = 0, parity ^= 1;
    };

    if (warp >= kGroups * kGroupWarps) {  // ------------------------------------------------------------ copies
        give_registers<kCopierRegisters>();
        wait_for_predecessors();
        const int thread = threadIdx.x - kGroups * kGroupThreads;
        // A pass copies kPassRows rows, a multiple of 8: a thread's places in shared memory are equally far apart.
        constexpr int kPassRows = kGroupThreads / kChunks / 8 * 8;
        constexpr int kPasses = kKeys / kPassRows;
        const bool copies = thread < kPassRows * kChunks;
        const int own_row = thread / kChunks, chunk = thread % kChunks;
        const uint32 place = Keys::offset(own_row, chunk), query_place = Queries::offset(own_row, chunk);
        const uint32 pass_bytes = kPassRows * (chunk < 8 ? Keys::kRowBytes : Keys::kRestBytes);
        const int heads = num_kv_heads * group;
        const int page_mask = (1 << page_shift) - 1, page_rows = num_kv_heads << page_shift;
        int queries_parity = 1;
        // A tile is appended when it has landed, before its place is taken again: as late as possible.
        constexpr int kLater = kStages - 1;
        Append* const own_appends = appends[warp - kGroups * kGroupWarps];
        if (lane < kStages) own_appends[lane].from = own_appends[lane].to = 0;
        __syncwarp();

        // Element of this thread's piece of a row in the caches; page_starts: the head's first rows in
        // the pages of the tile from position `first` on, one a lane.
        const auto cache_offset = [&](uint32 page_starts, int first, int position) {
            const uint32 start =
                __shfl_sync(~0u, page_starts, (position >> page_shift) - (first >> page_shift));
            return static_cast<uint64>(start + (position & page_mask)) * kHeadDim + chunk * 8;
        };
        const auto pages_of = [&](const int* pages, int first, int end) {
            const int index = (first >> page_shift) + lane;
            return lane < 8 && index << page_shift < end ? __ldg(pages + index) : 0;
        };
        const auto append_tile = [&](int where) {
            const Append task = own_appends[where];
            if (task.to <= task.from) return;
            const unsigned char* const source = shared + kRingStart + where * kStageBytes + place;
            const uint32 starts = pages_of(task.pages, task.first, task.to) * page_rows + task.head_row;
#pragma unroll 2
            for (int i = 0; i < kPasses; ++i) {
                const int position = task.first + own_row + i * kPassRows;
                const uint64 offset = cache_offset(starts, task.first, position);
                if (!copies || position < task.from || position >= task.to) continue;
                *reinterpret_cast<uint4*>(k_cache + offset) =
                    *reinterpret_cast<const uint4*>(source + i * pass_bytes);
                *reinterpret_cast<uint4*>(v_cache + offset) =
                    *reinterpret_cast<const uint4*>(source + Keys::kBytes + i * pass_bytes);
            }
        };

        for (int piece = blockIdx.x, turn = 0; piece < pieces; turn ^= 1) {
            const int head = piece % heads, kv_head = head / group, head_row = kv_head << page_shift;
            const Block block = block_of<kRows>(piece / heads, query_start, kv_length, sequences);
            if (block.sequence < 0) break;  // surplus slots come last
            int taken = 0;
            if (thread == 0) taken = atomicAdd(counters, 1);
            const int* const pages = page_table + static_cast<long long>(block.sequence) * pages_per_sequence;
            const int end_row = min(block.first_row + kRows, block.new_tokens);
            const int end = block.past + end_row;
            const int tiles = (end + kKeys - 1) / kKeys;
            const int head_offset = kv_head * kHeadDim + chunk * 8;
            const int append_to = append && head % group == 0 ? end : 0;

            barrier_wait(shared_address(queries_empty + buffer), queries_parity);
            const uint32 query_target = query_area + buffer * Queries::kBytes + query_place;
            if (++buffer == kQueryBuffers) buffer = 0, queries_parity ^= 1;
            const T* source = q + static_cast<long long>(block.first_token + block.first_row + own_row) * q_stride +
                              head * kHeadDim + chunk * 8;
#pragma unroll 2
            for (int i = 0; i < kRows / kPassRows; ++i) {
                const bool wanted = block.first_row + own_row + i * kPassRows < block.new_tokens;
                if (copies) copy_async_16(query_target + i * pass_bytes, wanted ? source : q, wanted);
                source += kPassRows * q_stride;
            }

            int next_pages = pages_of(pages, 0, block.past);
            for (int tile = 0; tile < tiles; ++tile) {
                const uint32 page_starts = next_pages * page_rows + head_row;
                next_pages = pages_of(pages, (tile + 1) * kKeys, block.past);
                barrier_wait(shared_address(empty + stage), parity ^ 1);
                const int first = tile * kKeys;
                const uint32 target = stages + stage * kStageBytes + place;
                const long long row = block.first_token + first - block.past + own_row;
                const T* k_row = k + row * k_stride + head_offset;
                const T* v_row = v + row * v_stride + head_offset;
                if (first >= block.past) {
#pragma unroll 2
                    for (int i = 0; i < kPasses; ++i) {
                        const bool wanted = first + own_row + i * kPassRows < end;
                        if (copies) {
                            copy_async_16(target + i * pass_bytes, wanted ? k_row : k, wanted);
                            copy_async_16(target + Keys::kBytes + i * pass_bytes, wanted ? v_row : v, wanted);
                        }
                        k_row += kPassRows * k_stride;
                        v_row += kPassRows * v_stride;
                    }
                } else {
#pragma unroll 2
                    for (int i = 0; i < kPasses; ++i) {
                        const int position = first + own_row + i * kPassRows;
                        const bool wanted = position < end, is_past = position < block.past;
                        const uint64 offset = cache_offset(page_starts, first, position);
                        if (copies) {
                            const T* const k_from = is_past ? k_cache + offset : wanted ? k_row : k;
                            const T* const v_from = is_past ? v_cache + offset : wanted ? v_row : v;
                            copy_async_16(target + i * pass_bytes, k_from, wanted);
                            copy_async_16(target + Keys::kBytes + i * pass_bytes, v_from, wanted);
                        }
                        k_row += kPassRows * k_stride;
                        v_row += kPassRows * v_stride;
                    }
                }
                copy_async_arrive(shared_address(full + stage));
                copy_async_commit();
                if (thread == 0) {
                    if (tile == 0)
                        work[stage] = {tiles, block.first_row, block.first_token, block.new_tokens, block.past, head};
                    barrier_arrive(shared_address(full + stage));
                }
                // All lanes have read what is there; what comes there they read behind the next tiles' __syncwarp.
                __syncwarp();
                if (lane == 0)
                    own_appends[stage] = {pages, first, block.past + block.first_row, min(append_to, first + kKeys),
                                          head_row};
                advance();
                copy_async_wait<kLater>();
                append_tile(stage);
            }
            if (thread == 0) next_piece[turn] = gridDim.x + taken;
            asm volatile("bar.sync 1, %0;\n" ::"n"(kGroupThreads) : "memory");
            piece = next_piece[turn];
        }
        if (thread == 0) {
            __threadfence();
            if (atomicAdd(counters + 1, 1) == gridDim.x - 1) counters[0] = counters[1] = 0;  // nobody takes any more
        }
        copy_async_wait<0>();
        for (int later = 1; later <= kLater; ++later) append_tile((stage + later) % kStages);
        barrier_wait(shared_address(empty + stage), parity ^ 1);
        if (thread == 0) {
            work[stage].tiles = 0;
            barrier_arrive(shared_address(full + stage));
        }
        copy_async_arrive(shared_address(full + stage));
        return;
    }

    // --------------------------------------------------------------------------------------------- multiplies
    take_registers<kMultiplierRegisters<kGroups>>();
    wait_for_predecessors();
    const int warp_group = warp / kGroupWarps;
    const int member = lane & 3;
    const float slack = kRescaleSlack / scale_log2;
    const auto wait_for_tile = [&](int where, int phase) {
        barrier_wait(shared_address(full + where), phase);
        fence_for_wgmma();
    };
    const auto release = [&](int where) {
        __syncwarp();
        if (lane == 0) barrier_arrive(shared_address(empty + where));
    };
    while (true) {
        wait_for_tile(stage, parity);
        const Work task = work[stage];
        if (task.tiles == 0) return;
        uint32 query[kHeadDim / 16][4];
        const uint32 queries = query_area + buffer * Queries::kBytes;
#pragma unroll
        for (int step = 0; step < kHeadDim / 16; ++step) {
            const int query_row = warp * 16 + (lane & 15);
            load_matrices(query[step], queries + Queries::offset(query_row, 2 * step + (lane >> 4)));
        }
        barrier_arrive(shared_address(queries_empty + buffer));
        if (++buffer == kQueryBuffers) buffer = 0;

        const int group_row = task.first_row + warp_group * kGroupRows;
        const int row = group_row + (warp & 3) * 16 + (lane >> 2);  // and row + 8
        const int first_position = task.past + group_row;
        const int group_end = min(first_position + kGroupRows, task.past + task.new_tokens);
        const int own_tiles = group_row < task.new_tokens ? (group_end + kKeys - 1) / kKeys : 0;
        float maximum[2] = {-kInfinity, -kInfinity}, sum[2] = {0.0f, 0.0f}, factor[2];
        float output[32] = {}, rest[kRest > 0 ? kRest / 2 : 1] = {};  // of the two panels
        float score[kKeys / 2];
        uint32 weights[kKeys / 16][4];

        const auto multiply_keys = [&](int where) {
            const uint32 k_tile = uniform(stages + where * kStageBytes);
            const uint64 keys = matrix_descriptor<128>(k_tile);
#pragma unroll
            for (int step = 0; step < 4; ++step)
                Wgmma<T, kKeys>::product_rows(score, query[step], further(keys, step * 32), step > 0);
            if constexpr (kRest > 0) {
                const uint64 more = matrix_descriptor<Keys::kRestBytes>(k_tile + Keys::kRestStart);
#pragma unroll
                for (int step = 0; step < kRest / 16; ++step)
                    Wgmma<T, kKeys>::product_rows(score, query[4 + step], further(more, step * 32), 1);
            }
            wgmma_commit();
        };
        const auto multiply_values = [&](int where) {
            const uint32 v_tile = uniform(stages + where * kStageBytes + Keys::kBytes);
            const uint64 values = matrix_descriptor<128>(v_tile);
#pragma unroll
            for (int step = 0; step < kKeys / 16; ++step)
                Wgmma<T, 64>::product_registers(output, weights[step],
                                                further(values, step * 16 * Keys::kRowBytes));
            if constexpr (kRest > 0) {
                const uint64 more = matrix_descriptor<Keys::kRestBytes>(v_tile + Keys::kRestStart);
#pragma unroll
                for (int step = 0; step < kKeys / 16; ++step)
                    Wgmma<T, kRest>::product_registers(rest, weights[step],
                                                       further(more, step * 16 * Keys::kRestBytes));
            }
            wgmma_commit();
        };
        // Turns scores into weights, in place, and says whether the output has to be rescaled by `factor` before they count:
        // only when a maximum has grown by more than float16 weights could hold.
        const auto softmax = [&](int tile) {
            const int first = tile * kKeys;
            if (first + kKeys > first_position + 1) {
#pragma unroll
                for (int i = 0; i < kKeys / 2; ++i) {
                    const int key = first + (i >> 2) * 8 + member * 2 + (i & 1);
                    if (key > task.past + row + ((i >> 1) & 1) * 8) score[i] = -kInfinity;
                }
            }
            float raised[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float other = maximum[half];
                raised[half] = maximum[half];
#pragma unroll
                for (int j = 0; j < kKeys / 8; ++j) {
                    raised[half] = fmaxf(raised[half], score[4 * j + 2 * half]);
                    other = fmaxf(other, score[4 * j + 2 * half + 1]);
                }
                raised[half] = row_max(fmaxf(raised[half], other));
            }
            const bool grown = __any_sync(~0u, raised[0] > maximum[0] + slack || raised[1] > maximum[1] + slack);
            if (grown) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    factor[half] = exp2_approximate((maximum[half] - raised[half]) * scale_log2);
                    maximum[half] = raised[half];
                    sum[half] *= factor[half];
                }
            }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float shift = maximum[half] * scale_log2;
                float other = 0.0f;
#pragma unroll
                for (int j = 0; j < kKeys / 8; ++j) {
                    float& first_score = score[4 * j + 2 * half];
                    float& second_score = score[4 * j + 2 * half + 1];
                    first_score = exp2_approximate(fmaf(first_score, scale_log2, -shift));
                    second_score = exp2_approximate(fmaf(second_score, scale_log2, -shift));
                    sum[half] += first_score;
                    other += second_score;
                }
                sum[half] += other;
            }
            return grown;
        };
        const auto pack_weights = [&] {
#pragma unroll
            for (int i = 0; i < kKeys / 4; ++i)  // a pair of keys, of one of two rows
                weights[i / 4][i % 4] = pack_pair<T>(score[2 * i], score[2 * i + 1]);
        };

        if (own_tiles > 0) {
            wgmma_fence();
            multiply_keys(stage);
            wgmma_wait_but<0>();
            wgmma_settled(score);
            softmax(0);
            pack_weights();
            for (int tile = 1; tile < own_tiles; ++tile) {
                const int before = stage;
                advance();
                wait_for_tile(stage, parity);
                wgmma_fence();
                multiply_keys(stage);
                multiply_values(before);
                wgmma_wait_but<1>();
                wgmma_settled(score);
                const bool grown = softmax(tile);
                wgmma_wait_but<0>();
                wgmma_settled(output);
                wgmma_settled(rest);
                release(before);
                if (grown) {
#pragma unroll
                    for (int i = 0; i < 32; ++i) output[i] *= factor[(i >> 1) & 1];
#pragma unroll
                    for (int i = 0; i < kRest / 2; ++i) rest[i] *= factor[(i >> 1) & 1];
                }
                pack_weights();
            }
            wgmma_fence();
            multiply_values(stage);
            wgmma_wait_but<0>();
            wgmma_settled(output);
            wgmma_settled(rest);
            release(stage);
            advance();
        }
        for (int tile = own_tiles; tile < task.tiles; ++tile) {  // all in this group's future
            wait_for_tile(stage, parity);
            release(stage);
            advance();
        }

#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float inverse = 1.0f / row_sum(sum[half]);
            const int own_row = row + half * 8;
            T* const target = out + static_cast<long long>(task.first_token + own_row) * out_stride +
                              task.head * kHeadDim + member * 8;
#pragma unroll
            for (int j = 0; j < kChunks; j += 4) {
                uint32 word[4] = {};
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    if (j + i >= kChunks) continue;
                    const float* const sums = j + i < 8 ? output + 4 * (j + i) : rest + 4 * (j + i - 8);
                    word[i] = pack_pair<T>(sums[2 * half] * inverse, sums[2 * half + 1] * inverse);
                }
                transpose_quad(word, member);
                if (own_row < task.new_tokens && j + member < kChunks)
                    *reinterpret_cast<uint4*>(target + j * 8) = make_uint4(word[0], word[1], word[2], word[3]);
            }
        }
    }
#endif
}

}  // namespace trtc
