// Layer norm and root-mean-square norm of rows, with an optional residual add in front:
//   total = x + residual;  normed = (total - mean) / sqrt(variance + epsilon) * scale + shift
// One block a row; a thread keeps its kVectors 16-byte vectors in registers, so that each byte is read once.
#include "common/async.cuh"
#include "common/reduce.cuh"
#include "common/types.cuh"

namespace trtc {

constexpr int kMaxWarps = 16;

// x, residual, total, normed: [rows, columns]; scale, shift: [columns]. residual and total are both null or both given;
// scale and shift may be null. columns is a multiple of 16 / sizeof(T) and at most blockDim.x * kVectors vectors.
template <typename T, int kVectors, bool kRms>
__global__ void __launch_bounds__(512)
    layer_norm(T* normed, T* total, const T* x, const T* residual, const T* scale, const T* shift, int columns,
               float epsilon) {
    constexpr int kSize = Vector<T>::kSize;
    __shared__ Moments warp_moments[kMaxWarps];
    const size_t row = static_cast<size_t>(blockIdx.x) * columns;
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const int warps = blockDim.x / kWarpSize;

    allow_dependents();
    // The parameters are nobody's output: they are loaded before the wait.
    Vector<T> factor[kVectors], offset[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
        const int column = (threadIdx.x + i * blockDim.x) * kSize;
        if (scale && column < columns) factor[i] = load_vector(scale + column);
        if (shift && column < columns) offset[i] = load_vector(shift + column);
    }
    wait_for_predecessors();

    float value[kVectors][kSize];
    float sum = 0.f, count = 0.f;
    Vector<T> loaded[kVectors], added[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
        const int column = (threadIdx.x + i * blockDim.x) * kSize;
        if (column < columns) loaded[i] = load_vector_cg(x + row + column);
        if (residual && column < columns) added[i] = load_vector_cg(residual + row + column);
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
        const int column = (threadIdx.x + i * blockDim.x) * kSize;
        if (column >= columns) continue;
        unpack(loaded[i], value[i]);
        if (residual) {
            float other[kSize];
            unpack(added[i], other);
#pragma unroll
            for (int j = 0; j < kSize; ++j) value[i][j] += other[j];
            const Vector<T> rounded = pack<T>(value[i]);
            store_vector(total + row + column, rounded);
            unpack(rounded, value[i]);  // the norm is that of the sum as stored
        }
#pragma unroll
        for (int j = 0; j < kSize; ++j) sum += value[i][j];
        count += kSize;
    }

    Moments moments{warp_sum(count), 0.f, 0.f};
    if (!kRms && moments.count > 0.f) moments.mean = warp_sum(sum) / moments.count;
    float deviation = 0.f;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
        if ((threadIdx.x + i * blockDim.x) * kSize >= columns) continue;
#pragma unroll
        for (int j = 0; j < kSize; ++j) {
            const float distance = value[i][j] - moments.mean;
            deviation += distance * distance;
        }
    }
    moments.deviation = warp_sum(deviation);

    if (lane == 0) warp_moments[warp] = moments;
    __syncthreads();
    const Moments part = lane < warps ? warp_moments[lane] : Moments{0.f, 0.f, 0.f};
    const float mean = warp_sum(part.count * part.mean) / columns;
    const float distance = part.mean - mean;
    const float variance = warp_sum(part.deviation + part.count * distance * distance) / columns;
    const float inverse = rsqrtf(variance + epsilon);

#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
        const int column = (threadIdx.x + i * blockDim.x) * kSize;
        if (column >= columns) continue;
        float parameter[kSize];
#pragma unroll
        for (int j = 0; j < kSize; ++j) value[i][j] = (value[i][j] - mean) * inverse;
        if (scale) {
            unpack(factor[i], parameter);
#pragma unroll
            for (int j = 0; j < kSize; ++j) value[i][j] *= parameter[j];
        }
        if (shift) {
            unpack(offset[i], parameter);
#pragma unroll
            for (int j = 0; j < kSize; ++j) value[i][j] += parameter[j];
        }
        store_vector(normed + row + column, pack<T>(value[i]));
    }
}

}  // namespace trtc
