// What the attention kernels need beside mma.cuh: ldmatrix, an all-float16 product, pairs and exp2 (sm_80 and
// later).
#pragma once
#include "common/mma.cuh"
#include "common/types.cuh"

namespace trtc {

constexpr float kInfinity = __builtin_bit_cast(float, 0x7f800000);

// Four 8x8 matrices of 16-bit elements; lanes 8 i to 8 i + 7 give the addresses of the 16-byte rows of matrix
// i. Each lane gets, of every matrix, row lane / 4, elements 2 * (lane % 4) and the next.
__device__ __forceinline__ void load_matrices(uint32 (&fragment)[4], uint32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(address)
                 : "memory");
}

// The same of the transposed matrices.
__device__ __forceinline__ void load_matrices_transposed(uint32 (&fragment)[4], uint32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(address)
                 : "memory");
}

// The first two of the four matrices, whose rows lanes 0 to 15 give.
__device__ __forceinline__ void load_two_matrices(uint32 (&fragment)[4], uint32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];\n"
                 : "=r"(fragment[0]), "=r"(fragment[1])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void load_two_matrices_transposed(uint32 (&fragment)[4], uint32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];\n"
                 : "=r"(fragment[0]), "=r"(fragment[1])
                 : "r"(address)
                 : "memory");
}

// Transposes an 8x8 matrix of 16-bit elements that the warp holds, two neighbours of a row per lane.
__device__ __forceinline__ uint32 transpose_matrix(uint32 value) {
    uint32 result;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;\n" : "=r"(result) : "r"(value));
    return result;
}

// mma_16x8x16 with float16 sums: sum[0] holds row `group`, sum[1] row `group + 8`, two columns each.
__device__ __forceinline__ void mma_16x8x16_half(uint32 (&sum)[2], uint32 a0, uint32 a1, uint32 a2, uint32 a3,
                                                 uint32 b0, uint32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%0, %1}, {%2, %3, %4, %5}, {%6, %7}, {%0, %1};\n"
        : "+r"(sum[0]), "+r"(sum[1])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Two floats rounded to 16 bits in one register, the first in the low half.
template <typename T>
__device__ __forceinline__ uint32 pack_pair(float low, float high) {
    typename PairOf<T>::type pair;
    pair_from_float(pair, make_float2(low, high));
    return reinterpret_cast<const uint32&>(pair);
}

// 2^value by the special function unit (error 2 ulp); 0 for -infinity.
__device__ __forceinline__ float exp2_approximate(float value) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(result) : "f"(value));
    return result;
}

}  // namespace trtc
