// Embedding lookup: y[token] = table[ids[token] + offset] (+ positions[position_ids[token] + position_offset]).
//
// With `masked`, rows outside the table give zeros: a rank that holds a slice of the vocabulary looks up its own ids
// and leaves the others to the all-reduce. Without it the caller guarantees that ids are inside.
#include "common/async.cuh"
#include "common/types.cuh"

namespace trtc {

// y: [tokens, columns]; ids, position_ids: [tokens] int32; table: [table_rows, columns];
// position_table: [position_rows, columns] or null. columns is a multiple of 16 / sizeof(T).
template <typename T>
__global__ void embedding(T* y, const int* ids, const T* table, const int* position_ids, const T* position_table,
                          int columns, int offset, int table_rows, int position_offset, int position_rows,
                          int masked) {
    constexpr int kSize = Vector<T>::kSize;
    const int token = blockIdx.x;
    const int column = (blockIdx.y * blockDim.x + threadIdx.x) * kSize;
    allow_dependents();
    wait_for_predecessors();
    if (column >= columns) return;

    // Clamped, so that a bad id reads a wrong row of the table rather than foreign memory.
    const int row = __ldcg(ids + token) + offset;
    const bool inside = row >= 0 && row < table_rows;
    const int safe = min(max(row, 0), table_rows - 1);
    float value[kSize] = {};
    Vector<T> found = load_vector(table + static_cast<size_t>(safe) * columns + column);
    if (inside || !masked) unpack(found, value);
    if (position_table) {
        const int position = min(max(__ldcg(position_ids + token) + position_offset, 0), position_rows - 1);
        float place[kSize];
        unpack(load_vector(position_table + static_cast<size_t>(position) * columns + column), place);
#pragma unroll
        for (int i = 0; i < kSize; ++i) value[i] += place[i];
    }
    store_vector(y + static_cast<size_t>(token) * columns + column, pack<T>(value));
}

}  // namespace trtc
