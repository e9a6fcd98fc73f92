// Warpgroup matrix products of Hopper (compile for sm_90a): 64 rows by N columns by 16, 16-bit inputs, float32 sums.
//
// Operands lie in shared memory in rows of 32, 64 or 128 bytes, swizzled: `swizzled` gives the place of 16-byte pieces.
// Sums are laid out as those of mma.m16n8k16: warp w of the group has rows 16 w ... 16 w + 15, and for every 8 columns
// four values per lane (PTX ISA, "Register Fragments for wgmma.mma_async.m64nNk16").
#pragma once
#include "common/types.cuh"

namespace trtc {

// Byte offset of a 16-byte piece in rows of `kRowBytes`, in a buffer aligned to 8 rows.
template <int kRowBytes>
__device__ __forceinline__ uint32 swizzled(int row, int piece) {
    static_assert(kRowBytes == 32 || kRowBytes == 64 || kRowBytes == 128, "swizzle modes of the hardware");
    const uint32 offset = row * kRowBytes + piece * 16;
    return offset ^ ((offset >> 3) & (kRowBytes - 16));
}

// Describes a matrix in shared memory whose rows are `kRowBytes` long. Serves both orientations: along the contiguous
// direction a matrix must not be wider than a row, so that the leading offset is not used.
template <int kRowBytes>
__device__ __forceinline__ uint64 matrix_descriptor(uint32 address) {
    constexpr uint32 kSwizzle = kRowBytes == 128 ? 1 : kRowBytes == 64 ? 2 : 3;
    constexpr uint32 kEightRows = 8 * kRowBytes / 16;
    const uint32 low = (address & 0x3ffff) >> 4 | 1u << 16;
    return low | static_cast<uint64>(kEightRows | kSwizzle << 30) << 32;
}

// The same of a matrix that lies `bytes` further on.
__device__ __forceinline__ uint64 further(uint64 descriptor, uint32 bytes) {
    const uint32 low = static_cast<uint32>(descriptor) + bytes / 16;
    return low | descriptor >> 32 << 32;
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }
__device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned 0;\n" ::: "memory"); }

// Waits until at most the latest `kPending` groups of products are unfinished.
template <int kPending>
__device__ __forceinline__ void wgmma_wait_but() {
    asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
}

// What is computed from these sums from here on stays behind the wait before it.
template <int kCount>
__device__ __forceinline__ void wgmma_settled(float (&sum)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(sum[i])::"memory");
}

// Makes this thread's writes to shared memory visible to wgmma; a barrier has to follow.
__device__ __forceinline__ void fence_for_wgmma() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }

// Registers of N columns in asm operand lists.
#define TRTC_R4(v, i) "+f"(v[i]), "+f"(v[i + 1]), "+f"(v[i + 2]), "+f"(v[i + 3])
#define TRTC_R8(v, i) TRTC_R4(v, i), TRTC_R4(v, i + 4)
#define TRTC_R12(v, i) TRTC_R8(v, i), TRTC_R4(v, i + 8)
#define TRTC_R16(v, i) TRTC_R8(v, i), TRTC_R8(v, i + 8)
#define TRTC_R20(v, i) TRTC_R16(v, i), TRTC_R4(v, i + 16)
#define TRTC_R24(v, i) TRTC_R16(v, i), TRTC_R8(v, i + 16)
#define TRTC_R28(v, i) TRTC_R16(v, i), TRTC_R12(v, i + 16)
#define TRTC_R32(v, i) TRTC_R16(v, i), TRTC_R16(v, i + 16)
#define TRTC_R36(v, i) TRTC_R32(v, i), TRTC_R4(v, i + 32)
#define TRTC_R40(v, i) TRTC_R32(v, i), TRTC_R8(v, i + 32)
#define TRTC_R44(v, i) TRTC_R32(v, i), TRTC_R12(v, i + 32)
#define TRTC_R48(v, i) TRTC_R32(v, i), TRTC_R16(v, i + 32)
#define TRTC_R52(v, i) TRTC_R32(v, i), TRTC_R20(v, i + 32)
#define TRTC_R56(v, i) TRTC_R32(v, i), TRTC_R24(v, i + 32)
#define TRTC_R60(v, i) TRTC_R32(v, i), TRTC_R28(v, i + 32)
#define TRTC_R64(v, i) TRTC_R32(v, i), TRTC_R32(v, i + 32)
#define TRTC_P4 "%0, %1, %2, %3"
#define TRTC_P8 TRTC_P4 ", %4, %5, %6, %7"
#define TRTC_P12 TRTC_P8 ", %8, %9, %10, %11"
#define TRTC_P16 TRTC_P12 ", %12, %13, %14, %15"
#define TRTC_P20 TRTC_P16 ", %16, %17, %18, %19"
#define TRTC_P24 TRTC_P20 ", %20, %21, %22, %23"
#define TRTC_P28 TRTC_P24 ", %24, %25, %26, %27"
#define TRTC_P32 TRTC_P28 ", %28, %29, %30, %31"
#define TRTC_P36 TRTC_P32 ", %32, %33, %34, %35"
#define TRTC_P40 TRTC_P36 ", %36, %37, %38, %39"
#define TRTC_P44 TRTC_P40 ", %40, %41, %42, %43"
#define TRTC_P48 TRTC_P44 ", %44, %45, %46, %47"
#define TRTC_P52 TRTC_P48 ", %48, %49, %50, %51"
#define TRTC_P56 TRTC_P52 ", %52, %53, %54, %55"
#define TRTC_P60 TRTC_P56 ", %56, %57, %58, %59"
#define TRTC_P64 TRTC_P60 ", %60, %61, %62, %63"

template <typename T, int kColumns>
struct Wgmma;

// product_shared: sum (+)= A B^T, A and B in shared memory with rows along the summed dimension.
// product_registers: sum += A B, A in registers as mma.m16n8k16 takes it, B in shared memory with rows along the columns.
// product_rows: sum (+)= A B^T, A in registers, B in shared memory with rows along the summed dimension.
#define TRTC_WGMMA(T, TYPE, N, REGISTERS, PLACES, A0, A1, A2, A3, A4, A5)                                            \
    template <>                                                                                                      \
    struct Wgmma<T, N> {                                                                                             \
        static __device__ __forceinline__ void product_shared(float (&sum)[N / 2], uint64 a, uint64 b, int add) {    \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" A2 ", 0;\n"                                            \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" PLACES                 \
                         "}, %" A0 ", %" A1 ", p, 1, 1, 0, 0;\n}\n"                                                  \
                         : REGISTERS(sum, 0)                                                                         \
                         : "l"(a), "l"(b), "r"(add));                                                                \
        }                                                                                                            \
        static __device__ __forceinline__ void product_registers(float (&sum)[N / 2], const uint32 (&a)[4],          \
                                                                 uint64 b) {                                         \
            asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" PLACES                 \
                         "}, {%" A0 ", %" A1 ", %" A2 ", %" A3 "}, %" A4 ", 1, 1, 1, 1;\n"                           \
                         : REGISTERS(sum, 0)                                                                         \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                      \
        }                                                                                                            \
        static __device__ __forceinline__ void product_rows(float (&sum)[N / 2], const uint32 (&a)[4], uint64 b,     \
                                                            int add) {                                               \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" A5 ", 0;\n"                                            \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" PLACES                 \
                         "}, {%" A0 ", %" A1 ", %" A2 ", %" A3 "}, %" A4 ", p, 1, 1, 0;\n}\n"                        \
                         : REGISTERS(sum, 0)                                                                         \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));                            \
        }                                                                                                            \
    };
#define TRTC_WGMMA_WIDTHS(T, TYPE)                                                   \
    TRTC_WGMMA(T, TYPE, 8, TRTC_R4, TRTC_P4, "4", "5", "6", "7", "8", "9")           \
    TRTC_WGMMA(T, TYPE, 16, TRTC_R8, TRTC_P8, "8", "9", "10", "11", "12", "13")      \
    TRTC_WGMMA(T, TYPE, 24, TRTC_R12, TRTC_P12, "12", "13", "14", "15", "16", "17")  \
    TRTC_WGMMA(T, TYPE, 32, TRTC_R16, TRTC_P16, "16", "17", "18", "19", "20", "21")  \
    TRTC_WGMMA(T, TYPE, 40, TRTC_R20, TRTC_P20, "20", "21", "22", "23", "24", "25")  \
    TRTC_WGMMA(T, TYPE, 48, TRTC_R24, TRTC_P24, "24", "25", "26", "27", "28", "29")  \
    TRTC_WGMMA(T, TYPE, 56, TRTC_R28, TRTC_P28, "28", "29", "30", "31", "32", "33")  \
    TRTC_WGMMA(T, TYPE, 64, TRTC_R32, TRTC_P32, "32", "33", "34", "35", "36", "37")  \
    TRTC_WGMMA(T, TYPE, 72, TRTC_R36, TRTC_P36, "36", "37", "38", "39", "40", "41")  \
    TRTC_WGMMA(T, TYPE, 80, TRTC_R40, TRTC_P40, "40", "41", "42", "43", "44", "45")  \
    TRTC_WGMMA(T, TYPE, 88, TRTC_R44, TRTC_P44, "44", "45", "46", "47", "48", "49")  \
    TRTC_WGMMA(T, TYPE, 96, TRTC_R48, TRTC_P48, "48", "49", "50", "51", "52", "53")  \
    TRTC_WGMMA(T, TYPE, 104, TRTC_R52, TRTC_P52, "52", "53", "54", "55", "56", "57") \
    TRTC_WGMMA(T, TYPE, 112, TRTC_R56, TRTC_P56, "56", "57", "58", "59", "60", "61") \
    TRTC_WGMMA(T, TYPE, 120, TRTC_R60, TRTC_P60, "60", "61", "62", "63", "64", "65") \
    TRTC_WGMMA(T, TYPE, 128, TRTC_R64, TRTC_P64, "64", "65", "66", "67", "68", "69")

TRTC_WGMMA_WIDTHS(__half, "f16")
TRTC_WGMMA_WIDTHS(__nv_bfloat16, "bf16")

}  // namespace trtc
