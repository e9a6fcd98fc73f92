// A total order of (value, index): the larger value first, of equal values the lower index, NaN before
// everything.
#pragma once
#include "common/types.cuh"

namespace trtc {

// A larger rank is better: the value's order in the high half, the index, complemented, in the low half.
using Rank = uint64;

// Unsigned integers in the order of the values. Adding 0 makes -0 equal to +0 and every NaN the same,
// positive one, which so comes after infinity.
__device__ __forceinline__ uint32 order_of(float value) {
    const int bits = __float_as_int(value + 0.0f);
    return static_cast<uint32>(bits ^ (bits >> 31 | 0x80000000));
}

__device__ __forceinline__ Rank rank_of(uint32 order, int index) {
    return static_cast<Rank>(order) << 32 | ~static_cast<uint32>(index);
}

__device__ __forceinline__ Rank rank_of(float value, int index) {
    return rank_of(order_of(value), index);
}

__device__ __forceinline__ int index_of(Rank rank) {
    return static_cast<int>(~static_cast<uint32>(rank));
}

__device__ __forceinline__ float value_of(Rank rank) {
    const uint32 order = static_cast<uint32>(rank >> 32);
    return __uint_as_float(order & 0x80000000u ? order ^ 0x80000000u : ~order);
}

__device__ __forceinline__ Rank better(Rank a, Rank b) {
    return a > b ? a : b;
}

// The best of the warp, for every lane.
__device__ __forceinline__ Rank warp_best(Rank rank) {
    const uint32 order = __reduce_max_sync(~0u, static_cast<uint32>(rank >> 32));
    const uint32 low = static_cast<uint32>(rank >> 32) == order ? static_cast<uint32>(rank) : 0u;
    return static_cast<Rank>(order) << 32 | __reduce_max_sync(~0u, low);
}

}  // namespace trtc
