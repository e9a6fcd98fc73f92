// Sums over a warp and over a team of warps; every thread gets the result.
#pragma once

namespace trtc {

constexpr int kWarpSize = 32;

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
    return value;
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
        value = fmaxf(value, __shfl_xor_sync(~0u, value, offset));
    }
    return value;
}

// Count, mean and summed squared deviation of a set of numbers. Sets merge without the cancellation that
// E[x^2] - E[x]^2 suffers from (Chan, Golub, LeVeque 1979).
struct alignas(16) Moments {
    float count;
    float mean;
    float deviation;  // sum of (x - mean)^2
};

}  // namespace trtc
