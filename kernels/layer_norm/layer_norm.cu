// Layer norm and root-mean-square norm of rows, with an optional residual add in front:
//   total = x + residual;  normed = (total - mean) / sqrt(variance + epsilon) * scale + shift
// One block a row; a thread keeps its kVectors 16-byte vectors in registers, so that each byte is read once.
#include "common/async.cuh"
#include "common/norm_row.cuh"

namespace trtc {

// x, residual, total, normed: [rows, columns]; scale, shift: [columns]. residual and total are both null or both given;
// scale and shift may be null. columns is a multiple of 16 / sizeof(T) and at most blockDim.x * kVectors vectors.
template <typename T, int kVectors, bool kRms>
__global__ void __launch_bounds__(kMaxNormThreads)
    layer_norm(T* normed, T* total, const T* x, const T* residual, const T* scale, const T* shift, int columns,
               float epsilon) {
    constexpr int kSize = Vector<T>::kSize;
    __shared__ Moments warp_moments[kMaxNormWarps];
    const size_t row = static_cast<size_t>(blockIdx.x) * columns;
    const int held = held_vectors<T, kVectors>(columns);

    allow_dependents();
    // The parameters are nobody's output: they are loaded before the wait.
    const NormParameters<T, kVectors> parameters(scale, shift, held);
    wait_for_predecessors();

    float value[kVectors][kSize];
    Vector<T> loaded[kVectors], added[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
        const size_t at = row + norm_column<T>(i);
        if (i < held) loaded[i] = load_vector_cg(x + at);
        if (residual && i < held) added[i] = load_vector_cg(residual + at);
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
        if (i >= held) continue;
        unpack(loaded[i], value[i]);
        if (residual) {
            float other[kSize];
            unpack(added[i], other);
#pragma unroll
            for (int j = 0; j < kSize; ++j) value[i][j] += other[j];
            const Vector<T> rounded = pack<T>(value[i]);
            store_vector(total + row + norm_column<T>(i), rounded);
            unpack(rounded, value[i]);  // the norm is that of the sum as stored
        }
    }
    const Moments moments = block_moments<T, kVectors, kRms>(value, held, columns, warp_moments);
    store_normed(normed + row, value, held, parameters, moments, columns, epsilon);
}

}  // namespace trtc
