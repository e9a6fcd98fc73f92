// Copies the k and v of new tokens into the paged cache.
//
// Elements are copied as 16 bytes at a time, so the kernel needs no element type unless it rounds them. Grid:
// enough blocks for num_tokens * pieces threads; one thread copies one piece of k and of v.

#include "common/async.cuh"
#include "common/fp8.cuh"

namespace trtc {

// The sequence that owns a packed row: the last one whose start is not after it (empty sequences own none).
__device__ __forceinline__ int sequence_of(int token, const int* query_start, int sequences) {
    int low = 0, high = sequences - 1;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (query_start[middle] <= token) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    return low;
}

// Where in the cache a packed row belongs: a token slot, counted over all pages.
__device__ __forceinline__ long long slot_of(int token, const int* query_start, const int* kv_length,
                                             const int* page_table, int sequences, int page_shift,
                                             int pages_per_sequence) {
    const int sequence = sequence_of(token, query_start, sequences);
    const int position = kv_length[sequence] - (query_start[sequence + 1] - token);
    const long long page =
        page_table[static_cast<long long>(sequence) * pages_per_sequence + (position >> page_shift)];
    return (page << page_shift) + (position & ((1 << page_shift) - 1));
}

// k, v: packed rows of `pieces` 16-byte pieces, `*_stride` pieces apart. k_cache, v_cache: [num_pages,
// page_size, pieces]. query_start: [sequences + 1], its last entry is the number of tokens; kv_length:
// [sequences], the new tokens included; page_table: [sequences, pages_per_sequence].
__global__ void __launch_bounds__(256)
    append_kv(const uint4* k, const uint4* v, uint4* k_cache, uint4* v_cache, const int* query_start,
              const int* kv_length, const int* page_table, int k_stride, int v_stride, int pieces,
              int sequences, int page_shift, int pages_per_sequence) {
    wait_for_predecessors();
    allow_dependents();
    const long long index = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    const int token = static_cast<int>(index / pieces);
    const int piece = static_cast<int>(index % pieces);
    if (token >= query_start[sequences]) return;
    const long long slot =
        slot_of(token, query_start, kv_length, page_table, sequences, page_shift, pages_per_sequence);
    k_cache[slot * pieces + piece] = __ldcg(k + static_cast<long long>(token) * k_stride + piece);
    v_cache[slot * pieces + piece] = __ldcg(v + static_cast<long long>(token) * v_stride + piece);
}

// The same into a cache of e4m3 numbers: a piece of 8 elements T becomes 8 bytes.
template <typename T>
__global__ void __launch_bounds__(256)
    append_kv_e4m3(const uint4* k, const uint4* v, uint2* k_cache, uint2* v_cache, const int* query_start,
                   const int* kv_length, const int* page_table, int k_stride, int v_stride, int pieces,
                   int sequences, int page_shift, int pages_per_sequence) {
    using Piece = Eight<T, E4m3>;
    wait_for_predecessors();
    allow_dependents();
    const long long index = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    const int token = static_cast<int>(index / pieces);
    const int piece = static_cast<int>(index % pieces);
    if (token >= query_start[sequences]) return;
    const long long slot =
        slot_of(token, query_start, kv_length, page_table, sequences, page_shift, pages_per_sequence);
    k_cache[slot * pieces + piece] = Piece::store(__ldcg(k + static_cast<long long>(token) * k_stride + piece));
    v_cache[slot * pieces + piece] = Piece::store(__ldcg(v + static_cast<long long>(token) * v_stride + piece));
}

}  // namespace trtc
