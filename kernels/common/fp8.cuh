// e4m3 numbers (float8_e4m3fn) beside 16-bit elements: pairs and pieces of eight, both ways.
#pragma once
#include "common/types.cuh"

namespace trtc {

// One e4m3 number, as it is stored.
struct E4m3 {
    unsigned char bits;
};

template <typename T>
constexpr bool kIsHalf = false;
template <>
constexpr bool kIsHalf<__half> = true;

// The product of pairs of elements, all given by their bits.
template <typename T>
__device__ __forceinline__ uint32 multiply_pairs(uint32 a, uint32 b) {
    using Pair = typename PairOf<T>::type;
    const Pair result = __hmul2(reinterpret_cast<const Pair&>(a), reinterpret_cast<const Pair&>(b));
    return reinterpret_cast<const uint32&>(result);
}

// Sign, four bits of exponent and three of mantissa, moved to where T has them, are the number but for the bias of the exponent,
// which a power of two makes up for; also of the smallest ones, which have no exponent in T either.
template <int kShift, uint32 kMask, bool kUpper>
__device__ __forceinline__ uint32 e4m3_moved(uint32 word) {
    const uint32 wide = __byte_perm(word, 0, kUpper ? 0x3424 : 0x1404);
    return ((wide >> kShift) & kMask) | (wide & 0x80008000u);
}

// Two neighbouring e4m3 numbers of a word, the upper or the lower two, as a pair of T; exact.
template <typename T>
struct Fp8Pair;
template <>
struct Fp8Pair<__half> {
    template <bool kUpper>
    static __device__ __forceinline__ uint32 of(uint32 word) {
#if __CUDA_ARCH__ >= 890
        const unsigned short pair = kUpper ? word >> 16 : word;
        uint32 result;
        asm("cvt.rn.f16x2.e4m3x2 %0, %1;\n" : "=r"(result) : "h"(pair));
        return result;
#else
        return multiply_pairs<__half>(e4m3_moved<1, 0x3f803f80u, kUpper>(word), 0x5c005c00u);  // 2^8
#endif
    }
};
template <>
struct Fp8Pair<__nv_bfloat16> {
    template <bool kUpper>
    static __device__ __forceinline__ uint32 of(uint32 word) {
        return multiply_pairs<__nv_bfloat16>(e4m3_moved<4, 0x07f007f0u, kUpper>(word), 0x7b807b80u);  // 2^120
    }
};

// The e4m3 number nearest to `value`, the even one of two: beyond 448, 448; NaN is 0x7f.
__device__ __forceinline__ uint32 to_e4m3(float value) {
    const float magnitude = fminf(fabsf(value), 448.0f);
    const uint32 bits = __float_as_uint(magnitude);
    // Below 2^-6, numbers are multiples of 2^-9; above, three bits of mantissa stay, and the bias of the exponent is 7 for 127.
    const uint32 small = __float2uint_rn(magnitude * 512.0f);
    const uint32 normal = ((bits + 0x7ffffu + (bits >> 20 & 1u)) >> 20) - (120u << 3);
    const uint32 number = magnitude < 0.015625f ? small : normal;
    return value != value ? 0x7fu : number | (__float_as_uint(value) >> 24 & 0x80u);
}

// A pair of T, given by its bits, as two e4m3 numbers.
template <typename T>
__device__ __forceinline__ uint32 to_e4m3_pair(uint32 pair) {
#if __CUDA_ARCH__ >= 890
    unsigned short result;
    if constexpr (kIsHalf<T>) {
        asm("cvt.rn.satfinite.e4m3x2.f16x2 %0, %1;\n" : "=h"(result) : "r"(pair));
    } else {
        const float2 two = pair_to_float(reinterpret_cast<const typename PairOf<T>::type&>(pair));
        asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;\n" : "=h"(result) : "f"(two.y), "f"(two.x));
    }
    return result;
#else
    const float2 two = pair_to_float(reinterpret_cast<const typename PairOf<T>::type&>(pair));
    return to_e4m3(two.x) | to_e4m3(two.y) << 8;
#endif
}

// Eight floats as e4m3 numbers, in order.
__device__ __forceinline__ uint2 to_e4m3_eight(const float (&value)[8]) {
    uint32 pair[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#if __CUDA_ARCH__ >= 890
        unsigned short two;
        asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;\n" : "=h"(two) : "f"(value[2 * i + 1]), "f"(value[2 * i]));
        pair[i] = two;
#else
        pair[i] = to_e4m3(value[2 * i]) | to_e4m3(value[2 * i + 1]) << 8;
#endif
    }
    return make_uint2(pair[0] | pair[1] << 16, pair[2] | pair[3] << 16);
}

// Eight neighbouring elements T of a row as a cache of C holds them: themselves, or e4m3 numbers.
template <typename T, typename C>
struct Eight {
    static constexpr bool kRounds = false;
    using Stored = uint4;
    static __device__ __forceinline__ Stored store(const uint4& elements) { return elements; }
    static __device__ __forceinline__ uint4 load(const Stored& stored) { return stored; }
};
template <typename T>
struct Eight<T, E4m3> {
    static constexpr bool kRounds = true;
    using Stored = uint2;
    static __device__ __forceinline__ Stored store(const uint4& elements) {
        return make_uint2(to_e4m3_pair<T>(elements.x) | to_e4m3_pair<T>(elements.y) << 16,
                          to_e4m3_pair<T>(elements.z) | to_e4m3_pair<T>(elements.w) << 16);
    }
    static __device__ __forceinline__ uint4 load(const Stored& stored) {
        using Pair = Fp8Pair<T>;
        return make_uint4(Pair::template of<false>(stored.x), Pair::template of<true>(stored.x),
                          Pair::template of<false>(stored.y), Pair::template of<true>(stored.y));
    }
};

}  // namespace trtc
