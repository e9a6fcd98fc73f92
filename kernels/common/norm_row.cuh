// The norm of a row, or of a part of one, that a block holds in registers: thread t has `held` of the 16-byte vectors
// t, t + blockDim.x, ..., kVectors at most.
#pragma once
#include "common/reduce.cuh"
#include "common/types.cuh"

namespace trtc {

constexpr int kMaxNormThreads = 512;
constexpr int kMaxNormWarps = kMaxNormThreads / kWarpSize;

// Elements before vector i of this thread.
template <typename T>
__device__ __forceinline__ int norm_column(int i) {
    return (threadIdx.x + i * blockDim.x) * Vector<T>::kSize;
}

// Vectors of this thread in a row of `columns` elements.
template <typename T, int kVectors>
__device__ __forceinline__ int held_vectors(int columns) {
    int held = 0;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) held += norm_column<T>(i) < columns;
    return held;
}

// What a norm is scaled and shifted by; either may be null.
template <typename T, int kVectors>
struct NormParameters {
    const T* scale;
    const T* shift;
    Vector<T> factor[kVectors], offset[kVectors];

    __device__ __forceinline__ NormParameters(const T* scale, const T* shift, int held) : scale(scale), shift(shift) {
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
            if (scale && i < held) factor[i] = load_vector(scale + norm_column<T>(i));
            if (shift && i < held) offset[i] = load_vector(shift + norm_column<T>(i));
        }
    }
};

// Of all values of the block, on every thread; without a mean (0) for the root mean square. columns: elements that the block
// holds. warp_moments: shared, free again once all threads have met.
template <typename T, int kVectors, bool kRms>
__device__ __forceinline__ Moments block_moments(const float (&value)[kVectors][Vector<T>::kSize], int held, int columns,
                                                 Moments (&warp_moments)[kMaxNormWarps]) {
    constexpr int kSize = Vector<T>::kSize;
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const int warps = blockDim.x / kWarpSize;
    float sum = 0.f, count = 0.f;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
        if (i >= held) continue;
#pragma unroll
        for (int j = 0; j < kSize; ++j) sum += value[i][j];
        count += kSize;
    }

    Moments moments{warp_sum(count), 0.f, 0.f};
    if (!kRms && moments.count > 0.f) moments.mean = warp_sum(sum) / moments.count;
    float deviation = 0.f;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
        if (i >= held) continue;
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
    if constexpr (kRms) return {static_cast<float>(columns), 0.f, warp_sum(part.deviation)};
    const float mean = warp_sum(part.count * part.mean) / columns;
    const float distance = part.mean - mean;
    return {static_cast<float>(columns), mean, warp_sum(part.deviation + part.count * distance * distance)};
}

// normed = (value - mean) / sqrt(variance + epsilon) * scale + shift, of a row of `columns` elements. Overwrites value.
template <typename T, int kVectors>
__device__ __forceinline__ void store_normed(T* normed, float (&value)[kVectors][Vector<T>::kSize], int held,
                                             const NormParameters<T, kVectors>& parameters, const Moments& moments,
                                             int columns, float epsilon) {
    constexpr int kSize = Vector<T>::kSize;
    const float inverse = rsqrtf(moments.deviation / columns + epsilon);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
        if (i >= held) continue;
        float parameter[kSize];
#pragma unroll
        for (int j = 0; j < kSize; ++j) value[i][j] = (value[i][j] - moments.mean) * inverse;
        if (parameters.scale) {
            unpack(parameters.factor[i], parameter);
#pragma unroll
            for (int j = 0; j < kSize; ++j) value[i][j] *= parameter[j];
        }
        if (parameters.shift) {
            unpack(parameters.offset[i], parameter);
#pragma unroll
            for (int j = 0; j < kSize; ++j) value[i][j] += parameter[j];
        }
        store_vector(normed + norm_column<T>(i), pack<T>(value[i]));
    }
}

}  // namespace trtc
