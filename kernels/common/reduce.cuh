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

__device__ __forceinline__ Moments merge(const Moments& a, const Moments& b) {
    const float count = a.count + b.count;
    const float share = count > 0.f ? __fdividef(b.count, count) : 0.f;
    const float distance = b.mean - a.mean;
    return {count, a.mean + share * distance, a.deviation + b.deviation + distance * distance * a.count * share};
}

// The union of the sets of the lanes whose numbers differ in the bits of `kMask` alone (a power of two, minus one).
template <int kMask>
__device__ __forceinline__ Moments merge_lanes(Moments set) {
#pragma unroll
    for (int bit = 1; bit <= kMask; bit *= 2) {
        const Moments other{__shfl_xor_sync(~0u, set.count, bit), __shfl_xor_sync(~0u, set.mean, bit),
                            __shfl_xor_sync(~0u, set.deviation, bit)};
        set = merge(set, other);
    }
    return set;
}

}  // namespace trtc
