// Tensor-core product of one 16x16 by 16x8 tile, 16-bit inputs, float sums (sm_80 and later).
//
// Lane = 4 * group + member. Each register holds two neighbouring k.
//   a[0], a[2]: row `group`,     k = 2 * member and k = 2 * member + 8      a[1], a[3]: the same of row `group + 8`
//   b[0], b[1]: column `group`,  k = 2 * member and k = 2 * member + 8
//   sum[0..1]:  row `group`,     columns 2 * member, 2 * member + 1         sum[2..3]:  the same of row `group + 8`
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace trtc {

template <typename T>
__device__ __forceinline__ void mma_16x8x16(float (&sum)[4], unsigned int a0, unsigned int a1, unsigned int a2,
                                            unsigned int a3, unsigned int b0, unsigned int b1);

template <>
__device__ __forceinline__ void mma_16x8x16<__half>(float (&sum)[4], unsigned int a0, unsigned int a1,
                                                    unsigned int a2, unsigned int a3, unsigned int b0,
                                                    unsigned int b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma_16x8x16<__nv_bfloat16>(float (&sum)[4], unsigned int a0, unsigned int a1,
                                                           unsigned int a2, unsigned int a3, unsigned int b0,
                                                           unsigned int b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

}  // namespace trtc
