// Causal attention of packed prompts (or chunks of them) with online softmax, and the append of their k and
// v.
//
// Template parameters:
//   T                  __half or __nv_bfloat16
//   kHeadDim           64, 80, 96 or 128
//   kRowTiles          tiles of 16 query rows per warp: 64 * kRowTiles query rows per block
//   kKeys              keys of a tile: 32 or 64
//   kHalfAccumulation  q.k and p.v are accumulated in float16 (T = __half only), else in float32
//   C                  what the cache holds: T, or E4m3
//
// A sequence's keys come from two places: tokens of earlier steps from the paged cache, the new ones from the
// packed rows beside q. So nothing has to be appended before this kernel runs; it copies the new k and v into
// the cache on the way, from the tiles it has in shared memory. Softmax is always in float32. With a cache of e4m3
// numbers, new k and v are rounded to them first, so that a token sees the same of the others whatever step they came in.
//
// Grid (query heads, slots): slots counts blocks of query rows over all sequences, num_tokens / rows +
// sequences is enough of them; surplus ones exit. Grid x is the head, so that neighbours in time read
// neighbouring memory.

#include "common/async.cuh"
#include "common/fp8.cuh"
#include "common/softmax_tiles.cuh"
#include "context_attention/block.cuh"

namespace trtc {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * 32;

// Shared memory: the query rows of the block, then two stages of a tile of k and a tile of v.
template <int kHeadDim, int kRowTiles, int kKeys, bool kRounds>
struct Layout {
    static_assert(kHeadDim % 16 == 0 && kKeys % 16 == 0, "whole mma tiles");
    static constexpr int kWarpRows = kRowTiles * 16;
    static constexpr int kRows = kWarps * kWarpRows;  // query rows of a block
    static constexpr int kChunks = kHeadDim / 8;      // 16-byte pieces of a row
    static constexpr int kRowBytes =
        (kChunks | 1) * 16;  // an odd number of pieces: ldmatrix meets no bank twice
    static constexpr int kTileBytes = kKeys * kRowBytes;
    static constexpr int kStageBytes = 2 * kTileBytes;
    static constexpr int kKeyBlocks = kKeys / 8;  // mma columns of a tile of scores
    static constexpr int kDimBlocks = kHeadDim / 8;
    static constexpr int kSteps = kHeadDim / 16;
    static constexpr int kCopies = (kKeys * kChunks + kThreads - 1) / kThreads;  // of k, per thread and tile
#if __CUDA_ARCH__ < 1200
    static constexpr bool kQueryInRegisters = kRowTiles * kHeadDim <= 128 && !(kRounds && kRowTiles > 1);
#else
    static constexpr bool kQueryInRegisters = kRowTiles == 1;  // two row tiles would spill there
#endif
};

// A 16x8 tile of sums as mma accumulates it.
template <typename T, bool kHalfAccumulation>
struct Sums {
    float value[4] = {};

    __device__ __forceinline__ void multiply_add(const uint32 (&a)[4], uint32 b0, uint32 b1) {
        mma_16x8x16<T>(value, a[0], a[1], a[2], a[3], b0, b1);
    }
    __device__ __forceinline__ float4 floats() const {
        return make_float4(value[0], value[1], value[2], value[3]);
    }
    __device__ __forceinline__ void scale(float upper, float lower) {
        value[0] *= upper, value[1] *= upper, value[2] *= lower, value[3] *= lower;
    }
};

template <>
struct Sums<__half, true> {
    uint32 pair[2] = {};

    __device__ __forceinline__ void multiply_add(const uint32 (&a)[4], uint32 b0, uint32 b1) {
        mma_16x8x16_half(pair, a[0], a[1], a[2], a[3], b0, b1);
    }
    __device__ __forceinline__ float4 floats() const {
        const float2 upper = __half22float2(reinterpret_cast<const __half2&>(pair[0]));
        const float2 lower = __half22float2(reinterpret_cast<const __half2&>(pair[1]));
        return make_float4(upper.x, upper.y, lower.x, lower.y);
    }
    __device__ __forceinline__ void scale(float upper, float lower) {
        __half2* const halves = reinterpret_cast<__half2*>(pair);
        halves[0] = __hmul2(halves[0], __float2half2_rn(upper));
        halves[1] = __hmul2(halves[1], __float2half2_rn(lower));
    }
};

// q, k, v, out: packed rows, `*_stride` elements apart. k_cache, v_cache: [num_pages, num_kv_heads,
// page_size, kHeadDim]. query_start: [sequences + 1]; kv_length: [sequences], the new tokens included;
// page_table: [sequences, pages_per_sequence]. append: also write the new k and v to the cache.
template <typename T, int kHeadDim, int kRowTiles, int kKeys, bool kHalfAccumulation, typename C = T>
__global__ void __launch_bounds__(kThreads, kRowTiles == 1 && kHeadDim < 128 && !Eight<T, C>::kRounds ? 3 : 2)
    context_attention(const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ v, C* k_cache,
                      C* v_cache, const int* __restrict__ query_start, const int* __restrict__ kv_length,
                      const int* __restrict__ page_table, T* __restrict__ out, int q_stride, int k_stride,
                      int v_stride, int out_stride, int sequences, int num_kv_heads, int group,
                      int page_shift, int pages_per_sequence, float scale_log2, int append) {
    using Piece = Eight<T, C>;
    using L = Layout<kHeadDim, kRowTiles, kKeys, Piece::kRounds>;
    using Tile = Sums<T, kHalfAccumulation>;
    extern __shared__ __align__(16) unsigned char shared[];
    const int lane = threadIdx.x & 31;
    const int warp = threadIdx.x >> 5;
    const int head = blockIdx.x;
    const int kv_head = head / group;
    wait_for_predecessors();
    allow_dependents();
    const Block block = block_of<L::kRows>(blockIdx.y, query_start, kv_length, sequences);
    if (block.sequence < 0) return;

    const CacheRows<kHeadDim> rows{page_table + static_cast<long long>(block.sequence) * pages_per_sequence, page_shift,
                                   HeadRows<kHeadDim>(num_kv_heads, kv_head, page_shift)};
    const uint32 query_area = shared_address(shared);
    const uint32 stages = query_area + L::kRows * L::kRowBytes;

    const T* const new_q = q + static_cast<long long>(block.first_token) * q_stride + head * kHeadDim;
    const T* const new_k = k + static_cast<long long>(block.first_token) * k_stride + kv_head * kHeadDim;
    const T* const new_v = v + static_cast<long long>(block.first_token) * v_stride + kv_head * kHeadDim;

#pragma unroll
    for (int i = 0; i < L::kRows * L::kChunks / kThreads; ++i) {
        const int piece = threadIdx.x + i * kThreads;
        const int row = piece / L::kChunks, chunk = piece % L::kChunks;
        const int token = block.first_row + row;
        copy_async_16(query_area + row * L::kRowBytes + chunk * 16,
                      new_q + static_cast<long long>(token) * q_stride + chunk * 8, token < block.new_tokens);
    }

    const int past_tiles = (block.past + kKeys - 1) / kKeys;
    const int end_row = min(block.first_row + L::kRows, block.new_tokens);  // keys of this block end here
    const int tiles = past_tiles + (end_row + kKeys - 1) / kKeys;
    const auto fetch = [&](int tile) {
        const uint32 stage = stages + (tile & 1) * L::kStageBytes;
        const bool is_past = tile < past_tiles;
        const int first_key = (is_past ? tile : tile - past_tiles) * kKeys;
        const int end_key = is_past ? block.past : block.new_tokens;
#pragma unroll
        for (int i = 0; i < L::kCopies; ++i) {
            const int piece = threadIdx.x + i * kThreads;
            const int row = piece / L::kChunks, chunk = piece % L::kChunks;
            if (row >= kKeys) break;
            const int key = first_key + row;
            const bool wanted = key < end_key;
            const uint32 target = stage + row * L::kRowBytes + chunk * 16;
            if constexpr (Piece::kRounds) {
                if (is_past) {
                    const long long offset = rows.offset(wanted ? key : 0) + chunk * 8;
                    copy_async_8(target, k_cache + offset, wanted);
                    copy_async_8(target + L::kTileBytes, v_cache + offset, wanted);
                    continue;
                }
                copy_async_16(target, new_k + static_cast<long long>(key) * k_stride + chunk * 8, wanted);
                copy_async_16(target + L::kTileBytes, new_v + static_cast<long long>(key) * v_stride + chunk * 8, wanted);
            } else {
                const T *k_source = new_k, *v_source = new_v;
                if (is_past) {
                    const long long offset = rows.offset(wanted ? key : 0);
                    k_source = k_cache + offset;
                    v_source = v_cache + offset;
                } else {
                    k_source += static_cast<long long>(key) * k_stride;
                    v_source += static_cast<long long>(key) * v_stride;
                }
                copy_async_16(target, k_source + chunk * 8, wanted);
                copy_async_16(target + L::kTileBytes, v_source + chunk * 8, wanted);
            }
        }
        copy_async_commit();
    };
    fetch(0);

    // Lane address patterns: matrices along rows then dims (A fragments, and B of v), dims then rows (B of
    // k).
    const uint32 rows_first = (lane & 15) * L::kRowBytes + (lane >> 4) * 16;
    const uint32 dims_first = ((lane & 7) + (lane >> 4) * 8) * L::kRowBytes + ((lane >> 3) & 1) * 16;
    const uint32 query_rows = query_area + warp * L::kWarpRows * L::kRowBytes + rows_first;

    uint32 query[L::kQueryInRegisters ? kRowTiles : 1][L::kSteps][4];
    float maximum[kRowTiles][2], sum[kRowTiles][2];  // rows g and g + 8 of each tile
    Tile output[kRowTiles][L::kDimBlocks];
#pragma unroll
    for (int row_tile = 0; row_tile < kRowTiles; ++row_tile)
#pragma unroll
        for (int i = 0; i < 2; ++i) maximum[row_tile][i] = -kInfinity, sum[row_tile][i] = 0.0f;

    const int warp_row = block.first_row + warp * L::kWarpRows;
    for (int tile = 0; tile < tiles; ++tile) {
        copy_async_wait<0>();
        if constexpr (Piece::kRounds) {
            unsigned char* const k_area = shared + L::kRows * L::kRowBytes + (tile & 1) * L::kStageBytes;
#pragma unroll
            for (int i = 0; i < L::kCopies; ++i) {
                const int piece = threadIdx.x + i * kThreads;
                const int row = piece / L::kChunks, chunk = piece % L::kChunks;
                if (row >= kKeys) break;
                unsigned char* const place = k_area + row * L::kRowBytes + chunk * 16;
                round_piece<T>(place, tile < past_tiles);
                round_piece<T>(place + L::kTileBytes, tile < past_tiles);
            }
        }
        __syncthreads();  // this tile has landed for everyone, and everyone is done with the one before
        if (tile + 1 < tiles) fetch(tile + 1);
        if constexpr (L::kQueryInRegisters) {
            if (tile == 0) {
#pragma unroll
                for (int row_tile = 0; row_tile < kRowTiles; ++row_tile)
#pragma unroll
                    for (int step = 0; step < L::kSteps; ++step)
                        load_matrices(query[row_tile][step],
                                      query_rows + row_tile * 16 * L::kRowBytes + step * 32);
            }
        }
        const bool is_past = tile < past_tiles;
        const int first_key = (is_past ? tile : tile - past_tiles) * kKeys;
        const int stage_offset = L::kRows * L::kRowBytes + (tile & 1) * L::kStageBytes;

        if (append && !is_past && first_key >= block.first_row && head % group == 0) {
#pragma unroll
            for (int i = 0; i < L::kCopies; ++i) {
                const int piece = threadIdx.x + i * kThreads;
                const int key = piece / L::kChunks, chunk = piece % L::kChunks;
                if (key >= kKeys || first_key + key >= end_row) break;
                const long long offset = rows.offset(block.past + first_key + key) + chunk * 8;
                const unsigned char* const source = shared + stage_offset + key * L::kRowBytes + chunk * 16;
                using Stored = typename Piece::Stored;
                *reinterpret_cast<Stored*>(k_cache + offset) =
                    Piece::store(*reinterpret_cast<const uint4*>(source));
                *reinterpret_cast<Stored*>(v_cache + offset) =
                    Piece::store(*reinterpret_cast<const uint4*>(source + L::kTileBytes));
            }
        }
        if (!is_past && first_key >= warp_row + L::kWarpRows) continue;  // all in this warp's future

        const uint32 k_tile = shared_address(shared) + stage_offset;
        const uint32 v_tile = k_tile + L::kTileBytes;
        Tile score[kRowTiles][L::kKeyBlocks];
#pragma unroll
        for (int step = 0; step < L::kSteps; ++step) {
            uint32 queries[kRowTiles][4];
#pragma unroll
            for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
                if constexpr (L::kQueryInRegisters) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) queries[row_tile][i] = query[row_tile][step][i];
                } else {
                    load_matrices(queries[row_tile], query_rows + row_tile * 16 * L::kRowBytes + step * 32);
                }
            }
#pragma unroll
            for (int pair = 0; pair < L::kKeyBlocks / 2; ++pair) {
                uint32 keys[4];
                load_matrices(keys, k_tile + pair * 16 * L::kRowBytes + dims_first + step * 32);
#pragma unroll
                for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
                    score[row_tile][2 * pair].multiply_add(queries[row_tile], keys[0], keys[1]);
                    score[row_tile][2 * pair + 1].multiply_add(queries[row_tile], keys[2], keys[3]);
                }
            }
        }
        const int end_key = is_past ? block.past : block.new_tokens;
        const bool masked = first_key + kKeys > (is_past ? end_key : warp_row + 1);
        uint32 probability[kRowTiles][L::kKeyBlocks][2];
#pragma unroll
        for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
            alignas(16) float values[L::kKeyBlocks][4];
#pragma unroll
            for (int i = 0; i < L::kKeyBlocks; ++i)
                reinterpret_cast<float4&>(values[i]) = score[row_tile][i].floats();
            if (masked) {
                const int row = warp_row + row_tile * 16 + (lane >> 2);
#pragma unroll
                for (int i = 0; i < L::kKeyBlocks * 4; ++i) {
                    const int key = first_key + (i >> 2) * 8 + (lane & 3) * 2 + (i & 1);
                    const int end = is_past ? end_key : row + ((i >> 1) & 1) * 8 + 1;
                    if (key >= end) values[i >> 2][i & 3] = -kInfinity;
                }
            }
            float factor[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float raised = maximum[row_tile][i];
#pragma unroll
                for (int j = 0; j < L::kKeyBlocks; ++j)
                    raised = fmaxf(raised, fmaxf(values[j][2 * i], values[j][2 * i + 1]));
                raised = row_max(raised);
                factor[i] = exp2_approximate((maximum[row_tile][i] - raised) * scale_log2);
                maximum[row_tile][i] = raised;
                const float shift = raised * scale_log2;
                float tile_sum = 0.0f;
#pragma unroll
                for (int j = 0; j < L::kKeyBlocks; ++j) {
                    const float first = exp2_approximate(fmaf(values[j][2 * i], scale_log2, -shift));
                    const float second = exp2_approximate(fmaf(values[j][2 * i + 1], scale_log2, -shift));
                    probability[row_tile][j][i] = pack_pair<T>(first, second);
                    tile_sum += first + second;
                }
                sum[row_tile][i] = sum[row_tile][i] * factor[i] + tile_sum;
            }
#pragma unroll
            for (int i = 0; i < L::kDimBlocks; ++i) output[row_tile][i].scale(factor[0], factor[1]);
        }
#pragma unroll
        for (int pair = 0; pair < L::kKeyBlocks / 2; ++pair) {
            uint32 weights[kRowTiles][4];
#pragma unroll
            for (int row_tile = 0; row_tile < kRowTiles; ++row_tile)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    weights[row_tile][i] = probability[row_tile][2 * pair + (i >> 1)][i & 1];
#pragma unroll
            for (int dims = 0; dims < L::kDimBlocks / 2; ++dims) {
                uint32 values[4];
                load_matrices_transposed(values, v_tile + pair * 16 * L::kRowBytes + rows_first + dims * 32);
#pragma unroll
                for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
                    output[row_tile][2 * dims].multiply_add(weights[row_tile], values[0], values[1]);
                    output[row_tile][2 * dims + 1].multiply_add(weights[row_tile], values[2], values[3]);
                }
            }
        }
    }

#pragma unroll
    for (int row_tile = 0; row_tile < kRowTiles; ++row_tile)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float factor = 1.0f / row_sum(sum[row_tile][i]);
            const int row = warp_row + row_tile * 16 + i * 8 + (lane >> 2);
            if (row >= block.new_tokens) continue;
            T* const target = out + static_cast<long long>(block.first_token + row) * out_stride +
                              head * kHeadDim + (lane & 3) * 2;
#pragma unroll
            for (int j = 0; j < L::kDimBlocks; ++j) {
                const float4 sums = output[row_tile][j].floats();
                const float first = i == 0 ? sums.x : sums.z, second = i == 0 ? sums.y : sums.w;
                *reinterpret_cast<uint32*>(target + j * 8) = pack_pair<T>(first * factor, second * factor);
            }
        }
}

}  // namespace trtc
