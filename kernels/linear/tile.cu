// Linear layer for up to 64 rows: y = act(x W^T + b) + residual, bound by the read of W.
//
// A block owns up to 16 * kFeatureTiles * kWarpsDown rows of W ("features"); a cluster of blocks splits K among them
// and adds up through distributed shared memory in a fixed order, so that the result does not depend on timing.
// W is the 16-row operand of the tensor cores, the rows of x are its 8 columns, kTokenTiles times.
//
// Both come through a ring of stages of kStageColumns columns. W's part of a stage is read back by the thread that
// copied it (see stream.cu: the k order inside a product is free, so 16 contiguous bytes feed two products); x's part
// is shared by all warps. W's part of the first stages is copied before the kernel waits for its predecessors.
#include "common/activation.cuh"
#include "common/async.cuh"
#include "common/cluster.cuh"
#include "common/mma.cuh"
#include "common/reduce.cuh"
#include "common/types.cuh"
#include "linear/weights.cuh"

namespace trtc {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kPieceSize = 8;  // elements in 16 bytes
constexpr int kSlotBytes = kThreads * 16;

template <int kTokenTiles, int kFeatureTiles, int kWarpsDown, int kStages, typename Weight>
struct TileLayout {
    static constexpr int kWarpsAcross = kWarps / kWarpsDown;                         // warps that split K
    static constexpr int kLaneColumns = kPieceSize * Weight::kPieces;                // columns in 16 bytes of W
    static constexpr int kWarpColumns = 4 * kLaneColumns;                            // of a warp in a step
    static constexpr int kStageColumns = kWarpColumns * kWarpsAcross < 64 ? 64 : kWarpColumns * kWarpsAcross;
    static constexpr int kRowChunks = kStageColumns / kPieceSize;
    static constexpr int kSteps = kStageColumns / (kWarpColumns * kWarpsAcross);     // of one warp in a stage
    static constexpr int kTokens = 8 * kTokenTiles;
    static constexpr int kFeatures = 16 * kFeatureTiles * kWarpsDown;
    static constexpr int kWeightBytes = kSteps * 2 * kFeatureTiles * kSlotBytes;     // of a stage
    static constexpr int kStageBytes = kWeightBytes + kTokens * kStageColumns * 2;
    static constexpr int kSumStride = kFeatures + 4;                                 // floats; 4 keeps 16-byte alignment
    // Byte offset of 16 bytes of x in a stage. The swizzle puts what the members of a group read of neighbouring rows into
    // different banks: neighbouring pieces, or every other one.
    static __device__ __forceinline__ unsigned int x_offset(int row, int chunk) {
        return (row * kRowChunks + (chunk ^ ((row & 1) * (Weight::kMemberColumns == kPieceSize ? 4 : 1)))) * 16;
    }
};

template <bool kFirst>
__device__ __forceinline__ float (&choose(float (&first)[4], float (&second)[4]))[4] {
    if constexpr (kFirst) return first;
    else return second;
}

// y, residual: [rows, features]; x: [rows, columns]; weight: [features, columns], as Weight stores it; bias: [features];
// scales: [features], [features, groups] or [features, groups, 2] with zeros, for integers. bias and residual may be null; residual may be y. columns is a
// multiple of 8, features_per_block of 4, columns_per_block of kStageColumns. The blocks of a cluster share a range of
// features.
template <typename T, int kTokenTiles, int kFeatureTiles, int kWarpsDown, int kStages, typename Weight = FloatWeight<T>>
__global__ void __launch_bounds__(kThreads, kTokenTiles * kFeatureTiles < 16 && Weight::kPieces == 1 ? 2 : 1)
    linear_tile(T* y, const T* x, const typename Weight::Stored* weight, const T* scales, const T* bias,
                const T* residual, int rows, int features, int columns, int features_per_block, int columns_per_block,
                int activation) {
    using Layout = TileLayout<kTokenTiles, kFeatureTiles, kWarpsDown, kStages, Weight>;
    constexpr int kPieces = Weight::kPieces;
    constexpr int kLaneColumns = Layout::kLaneColumns, kWarpColumns = Layout::kWarpColumns;
    constexpr int kStageColumns = Layout::kStageColumns, kRowChunks = Layout::kRowChunks;
    constexpr bool kGrouped = Weight::kGroups > 0;
    constexpr int kSpan = kGrouped ? kPieces / Weight::kGroups : 1;  // pieces that are multiplied before a scale
    extern __shared__ __align__(16) unsigned char shared[];

    allow_dependents();

    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const int group = lane / 4, member = lane % 4;
    const int warp_down = warp % kWarpsDown, warp_across = warp / kWarpsDown;
    const int cluster = cluster_size(), rank = cluster_rank();
    const int first_feature = blockIdx.x / cluster * features_per_block;
    const int end_feature = min(first_feature + features_per_block, features);
    const int first_column = rank * columns_per_block;
    const int end_column = min(first_column + columns_per_block, columns);
    const int stored_columns = padded_columns<Weight>(columns);
    const int end_stored = min(first_column + columns_per_block, stored_columns);
    const int stages = max(0, (end_column - first_column + kStageColumns - 1) / kStageColumns);

    const unsigned int base = shared_address(shared);
    const int lane_feature = first_feature + warp_down * 16 * kFeatureTiles + group;
    const int lane_column = first_column + warp_across * Layout::kSteps * kWarpColumns + member * kLaneColumns;

    auto copy_weight = [&](int stage) {
        const unsigned int slot = base + stage % kStages * Layout::kStageBytes + threadIdx.x * 16;
#pragma unroll
        for (int step = 0; step < Layout::kSteps; ++step) {
            const int column = lane_column + stage * kStageColumns + step * kWarpColumns;
#pragma unroll
            for (int octet = 0; octet < 2 * kFeatureTiles; ++octet) {
                const int feature = lane_feature + 8 * octet;
                const bool valid = feature < end_feature && column < end_stored;
                constexpr int kPer = Weight::kColumnsPerStored;
                const uint32 place = static_cast<uint32>(feature) * (stored_columns / kPer) + column / kPer;
                stream_async_16(slot + (step * 2 * kFeatureTiles + octet) * kSlotBytes, weight + (valid ? place : 0),
                                valid);
            }
        }
    };
    auto copy_x = [&](int stage) {
        const unsigned int target = base + stage % kStages * Layout::kStageBytes + Layout::kWeightBytes;
#pragma unroll
        for (int i = 0; i < (Layout::kTokens * kRowChunks + kThreads - 1) / kThreads; ++i) {
            const int index = threadIdx.x + i * kThreads;
            const int row = index / kRowChunks, chunk = index % kRowChunks;
            if (row >= Layout::kTokens) break;
            const int column = first_column + stage * kStageColumns + chunk * kPieceSize;
            const bool valid = row < rows && column < end_column;
            const uint32 offset = valid ? static_cast<uint32>(row) * columns + column : 0;
            copy_async_16(target + Layout::x_offset(row, chunk), x + offset, valid);
        }
    };
    // Scales of groups are loaded to registers a stage ahead of their use.
    using Scales = GroupScales<T, Weight>;
    constexpr int kScales = kGrouped ? Layout::kSteps * 2 * kFeatureTiles : 1;
    Scales scale[kScales], next_scale[kScales];
    auto load_group_scales = [&](int stage) {
#pragma unroll
        for (int i = 0; i < kScales; ++i) {
            const int column = lane_column + stage * kStageColumns + i / (2 * kFeatureTiles) * kWarpColumns;
            const int feature = lane_feature + 8 * (i % (2 * kFeatureTiles));
            next_scale[i] = load_scales<T, Weight>(scales, feature, features, column, stored_columns);
        }
    };

#pragma unroll 1
    for (int stage = 0; stage < kStages - 1; ++stage) {
        if (stage < stages) copy_weight(stage);
    }
    if (bias && first_feature + threadIdx.x < end_feature) prefetch_l2(bias + first_feature + threadIdx.x);
    if constexpr (kGrouped) load_group_scales(0);
    wait_for_predecessors();
#pragma unroll 1
    for (int stage = 0; stage < kStages - 1; ++stage) {
        if (stage < stages) copy_x(stage);
        copy_async_commit();
    }

    float sum[kFeatureTiles][kTokenTiles][4] = {};
#pragma unroll 1
    for (int stage = 0; stage < stages; ++stage) {
        copy_async_wait<kStages - 2>();
        __syncthreads();
        if (stage + kStages - 1 < stages) {  // into the stage that all warps left before the barrier
            copy_weight(stage + kStages - 1);
            copy_x(stage + kStages - 1);
        }
        copy_async_commit();
        if constexpr (kGrouped) {
#pragma unroll
            for (int i = 0; i < kScales; ++i) scale[i] = next_scale[i];
            load_group_scales(stage + 1);
        }

        const unsigned char* place = shared + stage % kStages * Layout::kStageBytes;
        const uint4* slot = reinterpret_cast<const uint4*>(place) + threadIdx.x;
#pragma unroll
        for (int step = 0; step < Layout::kSteps; ++step) {
            uint4 stored[2 * kFeatureTiles];
#pragma unroll
            for (int octet = 0; octet < 2 * kFeatureTiles; ++octet) {
                stored[octet] = slot[(step * 2 * kFeatureTiles + octet) * kThreads];
            }
            const int first_chunk = (warp_across * Layout::kSteps + step) * (kWarpColumns / kPieceSize) +
                                    member * (Weight::kMemberColumns / kPieceSize);
#pragma unroll
            for (int first = 0; first < kPieces; first += kSpan) {
                uint4 a[kSpan][2 * kFeatureTiles];
#pragma unroll
                for (int i = 0; i < kSpan * 2 * kFeatureTiles; ++i) {
                    const int piece = i / (2 * kFeatureTiles), octet = i % (2 * kFeatureTiles);
                    a[piece][octet] = scale[kGrouped ? step * 2 * kFeatureTiles + octet : 0].weight(stored[octet], first + piece);
                }
#pragma unroll
                for (int tile = 0; tile < kTokenTiles; ++tile) {
                    float part[kFeatureTiles][4] = {};  // of a group
#pragma unroll
                    for (int piece = 0; piece < kSpan; ++piece) {
                        const int chunk = first_chunk + (first + piece) * (Weight::kPieceColumns / kPieceSize);
                        const uint4 b = *reinterpret_cast<const uint4*>(place + Layout::kWeightBytes +
                                                                        Layout::x_offset(8 * tile + group, chunk));
#pragma unroll
                        for (int i = 0; i < kFeatureTiles; ++i) {
                            const uint4 low = a[piece][2 * i], high = a[piece][2 * i + 1];
                            auto& total = choose<kGrouped>(part[i], sum[i][tile]);
                            mma_16x8x16<T>(total, low.x, high.x, low.y, high.y, b.x, b.y);
                            mma_16x8x16<T>(total, low.z, high.z, low.w, high.w, b.z, b.w);
                        }
                    }
                    if constexpr (kGrouped) {
#pragma unroll
                        for (int i = 0; i < 4 * kFeatureTiles; ++i) {
                            const T factor = scale[step * 2 * kFeatureTiles + i / 2].scale(first);
                            sum[i / 4][tile][i % 4] += to_float(factor) * part[i / 4][i % 4];
                        }
                    }
                }
            }
        }
    }

    // The ring is done with: it now holds the sums, [kWarpsAcross][kTokens][kSumStride].
    copy_async_wait<0>();
    __syncthreads();
    float* sums = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int i = 0; i < kFeatureTiles; ++i) {
#pragma unroll
        for (int tile = 0; tile < kTokenTiles; ++tile) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int row = 8 * tile + 2 * member + j % 2;
                const int feature = (warp_down * kFeatureTiles + i) * 16 + group + j / 2 * 8;
                sums[(warp_across * Layout::kTokens + row) * Layout::kSumStride + feature] = sum[i][tile][j];
            }
        }
    }
    cluster_sync();

    constexpr int kQuads = Layout::kFeatures / 4;
    for (int index = threadIdx.x; index < (rows + cluster - 1) / cluster * kQuads;
         index += kThreads) {
        const int row = index / kQuads * cluster + rank;
        const int feature = first_feature + index % kQuads * 4;
        if (row >= rows || feature >= end_feature) continue;
        float total[4] = {};
        for (int peer = 0; peer < cluster; ++peer) {
#pragma unroll
            for (int across = 0; across < Layout::kWarpsAcross; ++across) {
                const int place = (across * Layout::kTokens + row) * Layout::kSumStride + index % kQuads * 4;
                const float4 part = *reinterpret_cast<const float4*>(in_rank(sums, peer) + place);
                total[0] += part.x, total[1] += part.y, total[2] += part.z, total[3] += part.w;
            }
        }
        const size_t place = static_cast<size_t>(row) * features + feature;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            if (feature + j >= end_feature) break;
            float value = total[j];
            if (Weight::kRowScales) value *= to_float(scales[feature + j]);
            if (bias) value += to_float(bias[feature + j]);
            value = activate(value, activation);
            if (residual) value += to_float(__ldcg(residual + place + j));
            y[place + j] = from_float<T>(value);
        }
    }
    cluster_arrive_relaxed();  // no block may end while another still reads its sums
    cluster_wait();
}

}  // namespace trtc
