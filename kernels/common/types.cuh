// Element types of the kernels (float, __half, __nv_bfloat16) and 16-byte vectors of them.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace trtc {

using uint32 = unsigned int;
using uint64 = unsigned long long;

// Two neighbouring 16-bit elements, as they lie in one 32-bit register.
template <typename T>
struct PairOf;
template <>
struct PairOf<__half> {
    using type = __half2;
};
template <>
struct PairOf<__nv_bfloat16> {
    using type = __nv_bfloat162;
};

template <typename T>
__device__ __forceinline__ float to_float(T value) {
    return static_cast<float>(value);
}

template <typename T>
__device__ __forceinline__ T from_float(float value) {
    return static_cast<T>(value);
}

__device__ __forceinline__ float2 pair_to_float(__half2 pair) { return __half22float2(pair); }
__device__ __forceinline__ float2 pair_to_float(__nv_bfloat162 pair) { return __bfloat1622float2(pair); }
__device__ __forceinline__ void pair_from_float(__half2& pair, float2 value) { pair = __float22half2_rn(value); }
__device__ __forceinline__ void pair_from_float(__nv_bfloat162& pair, float2 value) {
    pair = __float22bfloat162_rn(value);
}

// 16 bytes of elements: the widest access of one thread.
template <typename T>
struct alignas(16) Vector {
    static constexpr int kSize = 16 / sizeof(T);
    T element[kSize];
};

// Unpacks 16 bytes to floats.
template <typename T>
__device__ __forceinline__ void unpack(const Vector<T>& vector, float (&value)[Vector<T>::kSize]) {
    if constexpr (sizeof(T) == 2) {
        using Pair = typename PairOf<T>::type;
        const Pair* pairs = reinterpret_cast<const Pair*>(&vector);
#pragma unroll
        for (int i = 0; i < Vector<T>::kSize / 2; ++i) {
            const float2 two = pair_to_float(pairs[i]);
            value[2 * i] = two.x;
            value[2 * i + 1] = two.y;
        }
    } else {
#pragma unroll
        for (int i = 0; i < Vector<T>::kSize; ++i) value[i] = vector.element[i];
    }
}

// Rounds floats to elements, to nearest even.
template <typename T>
__device__ __forceinline__ Vector<T> pack(const float (&value)[Vector<T>::kSize]) {
    Vector<T> vector;
    if constexpr (sizeof(T) == 2) {
        using Pair = typename PairOf<T>::type;
        Pair* pairs = reinterpret_cast<Pair*>(&vector);
#pragma unroll
        for (int i = 0; i < Vector<T>::kSize / 2; ++i) {
            pair_from_float(pairs[i], make_float2(value[2 * i], value[2 * i + 1]));
        }
    } else {
#pragma unroll
        for (int i = 0; i < Vector<T>::kSize; ++i) vector.element[i] = value[i];
    }
    return vector;
}

// Loads that skip L1: for data a predecessor kernel wrote while this one may already have been running.
template <typename T>
__device__ __forceinline__ Vector<T> load_vector_cg(const T* pointer) {
    const uint4 bits = __ldcg(reinterpret_cast<const uint4*>(pointer));
    return *reinterpret_cast<const Vector<T>*>(&bits);
}

template <typename T>
__device__ __forceinline__ Vector<T> load_vector(const T* pointer) {
    return *reinterpret_cast<const Vector<T>*>(pointer);
}

template <typename T>
__device__ __forceinline__ void store_vector(T* pointer, const Vector<T>& vector) {
    *reinterpret_cast<Vector<T>*>(pointer) = vector;
}

}  // namespace trtc
