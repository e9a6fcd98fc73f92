// embedding.cu as TensorRT calls a kernel of an ahead-of-time plugin: addresses of the inputs, int32 scalars, addresses of
// the outputs.

#include "common/async.cuh"
#include "common/types.cuh"

namespace trtc {

template <typename T>
__device__ void embedding(T* y, const int* ids, const T* table, const int* position_ids, const T* position_table,
                          int columns, int offset, int table_rows, int position_offset, int position_rows, int masked);

// y[token] = table[ids[token] + offset], zero for rows outside the table. All arguments as in embedding.
template <typename T>
__global__ void lookup(const int* ids, const T* table, int columns, int offset, int table_rows, T* y) {
    embedding<T>(y, ids, table, nullptr, nullptr, columns, offset, table_rows, 0, 1, 1);
}

// The same plus positions[position_ids[token] + position_offset].
template <typename T>
__global__ void lookup_with_positions(const int* ids, const T* table, const int* position_ids, const T* positions,
                                      int columns, int offset, int table_rows, int position_offset, int position_rows,
                                      T* y) {
    embedding<T>(y, ids, table, position_ids, positions, columns, offset, table_rows, position_offset, position_rows, 1);
}

}  // namespace trtc

#include "tensorrt_aot/as_functions.cuh"
#include "embedding/embedding.cu"
