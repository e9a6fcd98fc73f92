// Outputs of linear kernels whose threads end with sums of two neighbouring features.
#pragma once
#include "common/types.cuh"

namespace trtc {

// Two neighbouring outputs of a row; those from `count` on do not exist.
template <typename T>
__device__ __forceinline__ typename PairOf<T>::type load_pair(const T* pointer, int count, bool aligned) {
    typename PairOf<T>::type pair;
    pair_from_float(pair, make_float2(0.f, 0.f));
    if (aligned && count >= 2) {
        *reinterpret_cast<uint32*>(&pair) = __ldcg(reinterpret_cast<const uint32*>(pointer));
    } else {
        if (count > 0) pair.x = __ldcg(pointer);
        if (count > 1) pair.y = __ldcg(pointer + 1);
    }
    return pair;
}

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
