// Causal attention of packed prompts (or chunks of them) on Hopper's warpgroup matrix units: compile for
// sm_90a.
//
// The same function as context_attention.cu with float32 sums, see there. Template parameters:
//   T         __half or __nv_bfloat16
//   kHeadDim  64, 80, 96 or 128
//   kGroups   warpgroups: a block handles 64 * kGroups query rows
//   C         what the cache holds: T, or E4m3
//
// Rows of q, k and v lie in shared memory as a panel of 64 dims and, if there are more, a panel of the rest.

#include "common/async.cuh"
#include "common/fp8.cuh"
#include "common/softmax_tiles.cuh"
#include "context_attention/block.cuh"
#include "context_attention/panels.cuh"

namespace trtc {

constexpr int kGroupThreads = 128;
constexpr int kGroupRows = 64;
constexpr int kKeys = 64;              // keys of a tile
constexpr float kRescaleSlack = 8.0f;  // log2: probabilities may reach 2^8 before sums are rescaled
constexpr int kStages = 3;             // tiles of k and v: one in use, two on their way

// q, k, v, out, the caches and tables: as in context_attention.cu. Grid (query heads, slots).
template <typename T, int kHeadDim, int kGroups, typename C = T>
__global__ void __launch_bounds__(kGroups* kGroupThreads, kHeadDim == 64 && kGroups == 2 ? 2 : 1)
    context_attention_hopper(const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ v,
                             C* k_cache, C* v_cache, const int* __restrict__ query_start,
                             const int* __restrict__ kv_length, const int* __restrict__ page_table,
                             T* __restrict__ out, int q_stride, int k_stride, int v_stride, int out_stride,
                             int sequences, int num_kv_heads, int group, int page_shift,
                             int pages_per_sequence, float scale_log2, int append) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    constexpr int kThreads = kGroups * kGroupThreads;
    constexpr int kRows = kGroups * kGroupRows;
    constexpr int kChunks = kHeadDim / 8;
    constexpr int kRest = kHeadDim - 64;
    using Piece = Eight<T, C>;
    using Queries = Panels<kHeadDim, kRows>;
    using Keys = Panels<kHeadDim, kKeys>;
    constexpr int kStageBytes = 2 * Keys::kBytes;  // k, then v
    extern __shared__ __align__(1024) unsigned char shared[];
    const int lane = threadIdx.x & 31;
    const int warp = threadIdx.x >> 5;
    const int warp_group = threadIdx.x / kGroupThreads;
    const int head = blockIdx.x;
    const int kv_head = head / group;
    wait_for_predecessors();
    allow_dependents();
    const Block block = block_of<kRows>(blockIdx.y, query_start, kv_length, sequences);
    if (block.sequence < 0) return;

    const CacheRows<kHeadDim> rows{page_table + static_cast<long long>(block.sequence) * pages_per_sequence, page_shift,
                                   HeadRows<kHeadDim>(num_kv_heads, kv_head, page_shift)};
    const uint32 query_area = shared_address(shared);
    const uint32 stages = query_area + Queries::kBytes;
    const T* const new_q = q + static_cast<long long>(block.first_token) * q_stride + head * kHeadDim;
    const T* const new_k = k + static_cast<long long>(block.first_token) * k_stride + kv_head * kHeadDim;
    const T* const new_v = v + static_cast<long long>(block.first_token) * v_stride + kv_head * kHeadDim;

#pragma unroll
    for (int i = 0; i < (kRows * kChunks + kThreads - 1) / kThreads; ++i) {
        const int piece = threadIdx.x + i * kThreads;
        const int row = piece / kChunks, chunk = piece % kChunks;
        const int token = block.first_row + row;
        if (row < kRows)
            copy_async_16(query_area + Queries::offset(row, chunk),
                          new_q + static_cast<long long>(token) * q_stride + chunk * 8,
                          token < block.new_tokens);
    }

    const int past_tiles = (block.past + kKeys - 1) / kKeys;
    const int end_row = min(block.first_row + kRows, block.new_tokens);  // keys of this block end here
    const int tiles = past_tiles + (end_row + kKeys - 1) / kKeys;
    // This thread's pieces of every tile: the same rows and places, so that addresses are worked out once.
    constexpr int kCopies = (kKeys * kChunks + kThreads - 1) / kThreads;
    const auto row_of = [&](int i) { return (static_cast<int>(threadIdx.x) + i * kThreads) / kChunks; };
    const auto chunk_of = [&](int i) { return (static_cast<int>(threadIdx.x) + i * kThreads) % kChunks; };
    int k_pieces[kCopies], v_pieces[kCopies];  // elements after the first of the tile
    uint32 places[kCopies];
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
        k_pieces[i] = row_of(i) * k_stride + chunk_of(i) * 8;
        v_pieces[i] = row_of(i) * v_stride + chunk_of(i) * 8;
        places[i] = Keys::offset(row_of(i), chunk_of(i));
    }
    const auto is_piece = [&](int i) { return kKeys * kChunks % kThreads == 0 || row_of(i) < kKeys; };
    const auto fetch = [&](int tile, int stage) {
        const uint32 target = stages + stage * kStageBytes;
        if (tile < past_tiles) {
#pragma unroll
            for (int i = 0; i < kCopies; ++i) {
                const int key = tile * kKeys + row_of(i);
                const bool wanted = key < block.past;
                const long long offset = rows.offset(wanted ? key : 0) + chunk_of(i) * 8;
                if (!is_piece(i)) continue;
                if constexpr (Piece::kRounds) {
                    copy_async_8(target + places[i], k_cache + offset, wanted);
                    copy_async_8(target + Keys::kBytes + places[i], v_cache + offset, wanted);
                } else {
                    copy_async_16(target + places[i], k_cache + offset, wanted);
                    copy_async_16(target + Keys::kBytes + places[i], v_cache + offset, wanted);
                }
            }
        } else if (tile < tiles) {
            const int first_key = (tile - past_tiles) * kKeys;
            const T* const k_tile = new_k + static_cast<long long>(first_key) * k_stride;
            const T* const v_tile = new_v + static_cast<long long>(first_key) * v_stride;
#pragma unroll
            for (int i = 0; i < kCopies; ++i) {
                const bool wanted = first_key + row_of(i) < block.new_tokens;
                if (is_piece(i)) {
                    copy_async_16(target + places[i], k_tile + k_pieces[i], wanted);
                    copy_async_16(target + Keys::kBytes + places[i], v_tile + v_pieces[i], wanted);
                }
            }
        }
        copy_async_commit();
    };
    fetch(0, 0);
    fetch(1, 1);

    float maximum[2] = {-kInfinity, -kInfinity}, sum[2] = {0.0f, 0.0f};  // rows g and g + 8 of the warp's 16
    float output[32] = {}, rest[kRest > 0 ? kRest / 2 : 1] = {};         // of the two panels
    const int group_row = block.first_row + warp_group * kGroupRows;
    const int row = group_row + (warp & 3) * 16 + (lane >> 2);
    const uint32 group_queries = query_area + warp_group * kGroupRows * Queries::kRowBytes;
    const uint32 group_rest =
        query_area + Queries::kRestStart + warp_group * kGroupRows * Queries::kRestBytes;

    for (int tile = 0, stage = 0; tile < tiles; ++tile, stage = stage == kStages - 1 ? 0 : stage + 1) {
        copy_async_wait<1>();
        if constexpr (Piece::kRounds) {
            unsigned char* const k_area = shared + Queries::kBytes + stage * kStageBytes;
#pragma unroll
            for (int i = 0; i < kCopies; ++i) {
                if (!is_piece(i)) continue;
                round_piece<T>(k_area + places[i], tile < past_tiles);
                round_piece<T>(k_area + Keys::kBytes + places[i], tile < past_tiles);
            }
        }
        fence_for_wgmma();
        __syncthreads();  // this tile has landed for everyone, and everyone is done with the one before
        fetch(tile + 2, stage == 0 ? kStages - 1 : stage - 1);
        const bool is_past = tile < past_tiles;
        const int first_key = (is_past ? tile : tile - past_tiles) * kKeys;
        const bool computes =
            is_past || first_key < group_row + kGroupRows;  // else all in this group's future
        const uint32 k_tile = stages + stage * kStageBytes;
        const uint32 v_tile = k_tile + Keys::kBytes;

        if (append && !is_past && first_key >= block.first_row && head % group == 0) {
            const unsigned char* const source = shared + (k_tile - query_area);
#pragma unroll
            for (int i = 0; i < kCopies; ++i) {
                if (!is_piece(i) || first_key + row_of(i) >= end_row) continue;
                const long long offset = rows.offset(block.past + first_key + row_of(i)) + chunk_of(i) * 8;
                using Stored = typename Piece::Stored;
                *reinterpret_cast<Stored*>(k_cache + offset) =
                    Piece::store(*reinterpret_cast<const uint4*>(source + places[i]));
                *reinterpret_cast<Stored*>(v_cache + offset) =
                    Piece::store(*reinterpret_cast<const uint4*>(source + Keys::kBytes + places[i]));
            }
        }
        if (!computes) continue;

        float score[kKeys / 2];
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < 4; ++step)
            Wgmma<T, kKeys>::product_shared(score, matrix_descriptor<128>(group_queries + step * 32),
                                            matrix_descriptor<128>(k_tile + step * 32), step > 0);
        if constexpr (kRest > 0) {
#pragma unroll
            for (int step = 0; step < kRest / 16; ++step)
                Wgmma<T, kKeys>::product_shared(
                    score, matrix_descriptor<Queries::kRestBytes>(group_rest + step * 32),
                    matrix_descriptor<Keys::kRestBytes>(k_tile + Keys::kRestStart + step * 32), 1);
        }
        wgmma_commit();
        wgmma_wait();

        if (first_key + kKeys > (is_past ? block.past : group_row + 1)) {
#pragma unroll
            for (int i = 0; i < kKeys / 2; ++i) {
                const int key = first_key + (i >> 2) * 8 + (lane & 3) * 2 + (i & 1);
                const int end = is_past ? block.past : row + ((i >> 1) & 1) * 8 + 1;
                if (key >= end) score[i] = -kInfinity;
            }
        }
        // Rescaled only when a maximum has grown by a factor that float16 probabilities could not hold.
        float raised[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            raised[half] = maximum[half];
#pragma unroll
            for (int j = 0; j < kKeys / 8; ++j)
                raised[half] =
                    fmaxf(raised[half], fmaxf(score[4 * j + 2 * half], score[4 * j + 2 * half + 1]));
            raised[half] = row_max(raised[half]);
        }
        const float slack = kRescaleSlack / scale_log2;
        if (__any_sync(~0u, raised[0] > maximum[0] + slack || raised[1] > maximum[1] + slack)) {
            float factor[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                factor[half] = exp2_approximate((maximum[half] - raised[half]) * scale_log2);
                maximum[half] = raised[half];
                sum[half] *= factor[half];
            }
#pragma unroll
            for (int i = 0; i < 32; ++i) output[i] *= factor[(i >> 1) & 1];
#pragma unroll
            for (int i = 0; i < kRest / 2; ++i) rest[i] *= factor[(i >> 1) & 1];
        }
        uint32 weights[kKeys / 16][4];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float shift = maximum[half] * scale_log2;
#pragma unroll
            for (int j = 0; j < kKeys / 8; ++j) {
                const float first = exp2_approximate(fmaf(score[4 * j + 2 * half], scale_log2, -shift));
                const float second = exp2_approximate(fmaf(score[4 * j + 2 * half + 1], scale_log2, -shift));
                weights[j / 2][(j & 1) * 2 + half] = pack_pair<T>(first, second);
                sum[half] += first + second;
            }
        }

        wgmma_fence();
#pragma unroll
        for (int step = 0; step < kKeys / 16; ++step) {
            Wgmma<T, 64>::product_registers(output, weights[step],
                                            matrix_descriptor<128>(v_tile + step * 16 * Keys::kRowBytes));
            if constexpr (kRest > 0)
                Wgmma<T, kRest>::product_registers(
                    rest, weights[step],
                    matrix_descriptor<Keys::kRestBytes>(v_tile + Keys::kRestStart +
                                                        step * 16 * Keys::kRestBytes));
        }
        wgmma_commit();
        wgmma_wait();
    }

#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float factor = 1.0f / row_sum(sum[half]);
        const int own_row = row + half * 8;
        if (own_row >= block.new_tokens) continue;
        T* const target = out + static_cast<long long>(block.first_token + own_row) * out_stride +
                          head * kHeadDim + (lane & 3) * 2;
#pragma unroll
        for (int j = 0; j < kHeadDim / 8; ++j) {
            const float* const sums = j < 8 ? output + 4 * j : rest + 4 * (j - 8);
            *reinterpret_cast<uint32*>(target + j * 8) =
                pack_pair<T>(sums[2 * half] * factor, sums[2 * half + 1] * factor);
        }
    }
#endif
}

}  // namespace trtc
