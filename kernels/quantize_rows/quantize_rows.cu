// Rows of activations as e4m3 numbers, with a scale for each row: the largest absolute value of a row becomes 448.
//
// One block a row; a thread keeps its kPieces 16-byte pieces in registers, so that each byte is read once.
#include "common/async.cuh"
#include "common/fp8.cuh"
#include "common/reduce.cuh"
#include "common/types.cuh"

namespace trtc {

constexpr int kMaxWarps = 16;
constexpr float kLargest = 448.0f;

// x: [rows, columns]; out: [rows, padded_columns], zeros from `columns` on; scales: [rows], of which value = number * scale.
// Both numbers of columns are multiples of 8, padded_columns at most blockDim.x * kPieces * 8. relu: of max(x, 0) instead of x.
// A row of zeros has the scale 1. A row with an infinity or NaN has NaN in it.
template <typename T, int kPieces>
__global__ void __launch_bounds__(512)
    quantize_rows(uint2* out, float* scales, const T* x, int columns, int padded_columns, int relu) {
    __shared__ float warp_largest[kMaxWarps];
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const int warps = blockDim.x / kWarpSize;
    allow_dependents();
    wait_for_predecessors();

    const T* const row = x + static_cast<uint64>(blockIdx.x) * columns;
    Vector<T> loaded[kPieces];
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
        const int column = (threadIdx.x + i * blockDim.x) * 8;
        if (column < columns) loaded[i] = load_vector_cg(row + column);
    }
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
        if ((threadIdx.x + i * blockDim.x) * 8 >= columns) continue;
        float value[8];
        unpack(loaded[i], value);
#pragma unroll
        for (int j = 0; j < 8; ++j) largest = fmaxf(largest, relu ? value[j] : fabsf(value[j]));
    }
    largest = warp_max(largest);
    if (lane == 0) warp_largest[warp] = largest;
    __syncthreads();
    largest = warp_max(lane < warps ? warp_largest[lane] : 0.0f);
    const float scale = largest > 0.0f ? largest / kLargest : 1.0f;
    if (threadIdx.x == 0) scales[blockIdx.x] = scale;

    uint2* const numbers = out + static_cast<uint64>(blockIdx.x) * (padded_columns / 8);
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
        const int piece = threadIdx.x + i * blockDim.x;
        if (piece * 8 >= padded_columns) continue;
        float value[8] = {};
        if (piece * 8 < columns) unpack(loaded[i], value);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            // Not fmaxf, which would make a number of NaN.
            if (relu && value[j] < 0.0f) value[j] = 0.0f;
            value[j] = __fdiv_rn(value[j], scale);
        }
        numbers[piece] = to_e4m3_eight(value);
    }
}

}  // namespace trtc
