// Linear layer for up to 64 rows on Hopper: y = act(x W^T + b) + residual, bound by the read of W. Chosen for 17 to 32 rows of
// weights that multicast.cu is not faster for, and for the logits of 9 rows and more.
//
// A block owns up to 64 * kFeatureTiles rows of W ("features"); a cluster of blocks splits K among them and adds up
// through distributed shared memory in a fixed order, so that the result does not depend on timing.
//
// Bytes in flight decide: a stage holds no more of W than the block owns, and the ring has as many stages as fit.
//
// One warp asks the tensor copy engine for stages of 64 columns of W and x; one or two warpgroups multiply them with
// wgmma, W as the 64-row operand, the rows of x as its kTokens columns. W's part of the first stages is asked for before
// the kernel waits for its predecessors.
#include "common/activation.cuh"
#include "common/async.cuh"
#include "common/cluster.cuh"
#include "common/reduce.cuh"
#include "common/tensor_copy.cuh"
#include "common/types.cuh"
#include "common/wgmma.cuh"

namespace trtc {

constexpr int kGroupThreads = 128;
constexpr int kProductDepth = 16;
constexpr int kMaxCluster = 8;
constexpr int kMaxStages = 16;

// Four neighbouring outputs of a row.
template <typename T>
struct alignas(4 * sizeof(T)) Quad {
    T element[4];
};

template <typename T>
__device__ __forceinline__ Quad<T> load_quad(const T* pointer, int count, bool aligned) {
    if (aligned && count == 4) {
        const uint2 bits = __ldcg(reinterpret_cast<const uint2*>(pointer));
        return *reinterpret_cast<const Quad<T>*>(&bits);
    }
    Quad<T> quad{};
    for (int j = 0; j < count; ++j) quad.element[j] = __ldcg(pointer + j);
    return quad;
}

template <typename T>
__device__ __forceinline__ void store_quad(T* pointer, const Quad<T>& quad, int count, bool aligned) {
    if (aligned && count == 4) {
        *reinterpret_cast<Quad<T>*>(pointer) = quad;
    } else {
        for (int j = 0; j < count; ++j) pointer[j] = quad.element[j];
    }
}

// y, residual: [rows, features]; bias: [features]. bias and residual may be null; residual may be y.
// weight_map: W [features, columns] in boxes of features_per_block rows of 64 columns, features_per_block a multiple
// of 8; x_map: x [rows, columns] in boxes of kTokens rows; both in 128-byte swizzle, zero beyond the matrix.
// columns_per_block is a multiple of 64. The ring has `ring_stages` stages, and room for a whole tile behind it.
template <typename T, int kTokens, int kFeatureTiles>
__global__ void __launch_bounds__(kFeatureTiles > 2 ? 288 : 160, kFeatureTiles > 2 ? 1 : 2)
    linear_warpgroup(T* y, const T* bias, const T* residual, const __grid_constant__ TensorMap weight_map,
                     const __grid_constant__ TensorMap x_map, int rows, int features, int columns,
                     int features_per_block, int columns_per_block, int activation, int ring_stages) {
    constexpr int kGroups = kFeatureTiles > 2 ? 2 : 1;
    constexpr int kGroupTiles = kFeatureTiles / kGroups;
    constexpr int kConsumers = kGroups * kGroupThreads;
    constexpr int kThreads = kConsumers + kWarpSize;
    constexpr int kFeatures = 64 * kFeatureTiles;
    const uint32 weight_bytes = features_per_block * kSwizzledRowBytes;
    const uint32 stage_bytes = weight_bytes + kTokens * kSwizzledRowBytes;
    constexpr int kSumStride = kFeatures + 4;  // floats; 4 keeps 16-byte alignment and spreads the banks

    extern __shared__ __align__(1024) unsigned char shared[];
    __shared__ __align__(8) uint64 full[kMaxStages], empty[kMaxStages];
    allow_dependents();

    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const int cluster = cluster_size(), rank = cluster_rank();
    const int first_feature = blockIdx.x / cluster * features_per_block;
    const int end_feature = min(first_feature + features_per_block, features);
    const int first_column = rank * columns_per_block;
    const int stages = max(0, (min(columns_per_block, columns - first_column) + kSwizzledColumns - 1) / kSwizzledColumns);
    const uint32 base = shared_address(shared);
    if (bias && first_feature + threadIdx.x < end_feature) prefetch_l2(bias + first_feature + threadIdx.x);

    if (threadIdx.x == kConsumers) {
        prefetch_tensor_map(weight_map);
        prefetch_tensor_map(x_map);
        for (int stage = 0; stage < ring_stages; ++stage) {
            barrier_init(shared_address(full + stage), 1);
            barrier_init(shared_address(empty + stage), kConsumers / kWarpSize);
        }
        barrier_init_fence();
    }
    __syncthreads();

    float sum[kGroupTiles][kTokens / 2] = {};
    const int group_place = warp / 4 * kGroupTiles * 64;  // first feature of the thread's warpgroup, in the block
    if (warp == kConsumers / kWarpSize) {
        if (lane == 0) {
            auto copy_weight = [&](int stage, int slot) {
                const uint32 barrier = shared_address(full + slot);
                barrier_expect(barrier, stage_bytes);
                copy_tensor(base + slot * stage_bytes, weight_map, first_column + stage * kSwizzledColumns,
                            first_feature, barrier);
            };
            auto copy_x = [&](int stage, int slot) {
                copy_tensor(base + slot * stage_bytes + weight_bytes, x_map, first_column + stage * kSwizzledColumns, 0,
                            shared_address(full + slot));
            };
            const int ahead = min(stages, ring_stages);
            for (int stage = 0; stage < ahead; ++stage) copy_weight(stage, stage);
            wait_for_predecessors();
            for (int stage = 0; stage < ahead; ++stage) copy_x(stage, stage);
            int slot = 0, parity = 0;
            for (int stage = ahead; stage < stages; ++stage) {
                barrier_wait(shared_address(empty + slot), parity);
                copy_weight(stage, slot);
                copy_x(stage, slot);
                if (++slot == ring_stages) slot = 0, parity ^= 1;
            }
        }
        __syncwarp();
    } else {
        int slot = 0, parity = 0, last_slot = 0;
        for (int stage = 0; stage < stages; ++stage) {
            const uint32 place = base + slot * stage_bytes;
            barrier_wait(shared_address(full + slot), parity);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < kSwizzledColumns; k += kProductDepth) {
                const uint64 b = matrix_descriptor<kSwizzledRowBytes>(place + weight_bytes + 2 * k);
#pragma unroll
                for (int i = 0; i < kGroupTiles; ++i) {
                    // Beyond features_per_block this reads what lies behind; those sums are never looked at.
                    const uint64 a = matrix_descriptor<kSwizzledRowBytes>(place + (group_place + i * 64) * kSwizzledRowBytes + 2 * k);
                    Wgmma<T, kTokens>::product_shared(sum[i], a, b, 1);
                }
            }
            wgmma_commit();
            wgmma_wait_but<1>();  // the stage before this one has been read
            if (stage > 0 && lane == 0) barrier_arrive(shared_address(empty + last_slot));
            last_slot = slot;
            if (++slot == ring_stages) slot = 0, parity ^= 1;
        }
        wgmma_wait();
    }
    wait_for_predecessors();  // every thread: what follows reads the residual and writes y

    // The ring is done with: it now holds the sums, [kTokens][kSumStride].
    __syncthreads();
    float* sums = reinterpret_cast<float*>(shared);
    if (warp < kConsumers / kWarpSize) {
#pragma unroll
        for (int i = 0; i < kGroupTiles; ++i) {
#pragma unroll
            for (int j = 0; j < kTokens / 2; ++j) {
                const int row = j / 4 * 8 + lane % 4 * 2 + j % 2;
                const int feature = group_place + 64 * i + 16 * (warp % 4) + lane / 4 + j % 4 / 2 * 8;
                sums[row * kSumStride + feature] = sum[i][j];
            }
        }
    }
    cluster_sync();

    constexpr int kQuads = kFeatures / 4;
    const bool aligned = features % 4 == 0;
    for (int index = threadIdx.x; index < (rows + cluster - 1) / cluster * kQuads; index += kThreads) {
        const int row = index / kQuads * cluster + rank;
        const int feature = first_feature + index % kQuads * 4;
        const int count = min(4, end_feature - feature);
        if (row >= rows || count <= 0) continue;
        const size_t place = static_cast<size_t>(row) * features + feature;
        float4 part[kMaxCluster];
#pragma unroll
        for (int peer = 0; peer < kMaxCluster; ++peer) {  // all loads first: each takes as long as one from L2
            part[peer] = make_float4(0.f, 0.f, 0.f, 0.f);
            if (peer < cluster) {
                const float* there = in_rank(sums, peer) + row * kSumStride + index % kQuads * 4;
                part[peer] = *reinterpret_cast<const float4*>(there);
            }
        }
        Quad<T> offset{}, addend{}, result;
        if (bias) offset = load_quad(bias + feature, count, true);
        if (residual) addend = load_quad(residual + place, count, aligned);
        float total[4] = {};
#pragma unroll
        for (int peer = 0; peer < kMaxCluster; ++peer) {
            total[0] += part[peer].x, total[1] += part[peer].y, total[2] += part[peer].z, total[3] += part[peer].w;
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float value = activate(total[j] + to_float(offset.element[j]), activation);
            result.element[j] = from_float<T>(value + to_float(addend.element[j]));
        }
        store_quad(y + place, result, count, aligned);
    }
    cluster_arrive_relaxed();  // no block may end while another still reads its sums
    cluster_wait();
}

}  // namespace trtc
