// Rows of q, k and v in shared memory, as wgmma reads them.
#pragma once
#include "common/wgmma.cuh"

namespace trtc {

// `kRows` rows of kHeadDim elements: a panel of 64 dims and, if there are more, a panel of the rest.
template <int kHeadDim, int kRows>
struct Panels {
    static constexpr int kRest = kHeadDim - 64;  // dims of the second panel
    static constexpr int kRowBytes = 128;
    static constexpr int kRestBytes = kRest * 2;
    static constexpr int kRestStart = kRows * kRowBytes;
    static constexpr int kBytes = kRows * kHeadDim * 2;

    // Byte offset of a 16-byte piece of a row.
    static __device__ __forceinline__ uint32 offset(int row, int piece) {
        if constexpr (kRest > 0) {
            if (piece >= 8) return kRestStart + swizzled<kRestBytes>(row, piece - 8);
        }
        return swizzled<kRowBytes>(row, piece);
    }
};

}  // namespace trtc
