// Outputs of linear kernels whose threads end with sums of two neighbouring features.
#pragma once
#include "common/types.cuh"

namespace trtc {

// A pair of neighbouring outputs of a row in bits; those from `count` on do not exist. Aligned, the pair is there or not.
template <typename T>
__device__ __forceinline__ uint32 load_bits(const T* pointer, int count, bool aligned) {
    uint32 bits = 0;
    if (aligned) {
        if (count > 0) bits = __ldcg(reinterpret_cast<const uint32*>(pointer));
    } else {
        const unsigned short* halves = reinterpret_cast<const unsigned short*>(pointer);
        if (count > 0) bits = __ldcg(halves);
        if (count > 1) bits |= static_cast<uint32>(__ldcg(halves + 1)) << 16;
    }
    return bits;
}

template <typename T>
__device__ __forceinline__ float2 pair_of_bits(uint32 bits) {
    return pair_to_float(reinterpret_cast<const typename PairOf<T>::type&>(bits));
}

// Those from `count` on are not stored.
template <typename T>
__device__ __forceinline__ void store_pair(T* pointer, float2 value, int count, bool aligned) {
    using Pair = typename PairOf<T>::type;
    Pair pair;
    pair_from_float(pair, value);
    if (aligned && count >= 2) {
        *reinterpret_cast<Pair*>(pointer) = pair;
    } else {
        if (count > 0) pointer[0] = pair.x;
        if (count > 1) pointer[1] = pair.y;
    }
}

}  // namespace trtc
