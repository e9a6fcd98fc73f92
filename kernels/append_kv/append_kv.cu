// Copies the k and v of new tokens into the paged cache.
//
// Elements are copied as 16 bytes at a time, so the kernel needs no element type unless it rounds them. Grid:
// enough blocks for num_tokens * pieces threads; one thread copies one piece of k and of v.

#include "common/async.cuh"
#include "common/fp8.cuh"
#include "common/paged.cuh"

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

// Where in the caches a piece of a packed row belongs, in pieces.
__device__ __forceinline__ long long place_of(int token, int piece, const int* query_start, const int* kv_length,
                                              const int* page_table, int head_pieces, int num_kv_heads, int sequences,
                                              int page_shift, int pages_per_sequence) {
    const int sequence = sequence_of(token, query_start, sequences);
    const int position = kv_length[sequence] - (query_start[sequence + 1] - token);
    const int page = page_table[static_cast<long long>(sequence) * pages_per_sequence + (position >> page_shift)];
    const HeadRows<1> rows(num_kv_heads, piece / head_pieces, page_shift);
    return rows.offset(page, position) * head_pieces + piece % head_pieces;
}

// k, v: packed rows of num_kv_heads * head_pieces 16-byte pieces, `*_stride` pieces apart. k_cache, v_cache: [num_pages,
// num_kv_heads, page_size, head_pieces]. query_start: [sequences + 1], its last entry is the number of tokens; kv_length:
// [sequences], the new tokens included; page_table: [sequences, pages_per_sequence].
__global__ void __launch_bounds__(256)
    append_kv(const uint4* k, const uint4* v, uint4* k_cache, uint4* v_cache, const int* query_start,
              const int* kv_length, const int* page_table, int k_stride, int v_stride, int head_pieces,
              int num_kv_heads, int sequences, int page_shift, int pages_per_sequence) {
    wait_for_predecessors();
    allow_dependents();
    const long long index = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    const int pieces = num_kv_heads * head_pieces;
    const int token = static_cast<int>(index / pieces);
    const int piece = static_cast<int>(index % pieces);
    if (token >= query_start[sequences]) return;
    const long long place = place_of(token, piece, query_start, kv_length, page_table, head_pieces, num_kv_heads,
                                     sequences, page_shift, pages_per_sequence);
    k_cache[place] = __ldcg(k + static_cast<long long>(token) * k_stride + piece);
    v_cache[place] = __ldcg(v + static_cast<long long>(token) * v_stride + piece);
}

// The same into a cache of e4m3 numbers: a piece of 8 elements T becomes 8 bytes.
template <typename T>
__global__ void __launch_bounds__(256)
    append_kv_e4m3(const uint4* k, const uint4* v, uint2* k_cache, uint2* v_cache, const int* query_start,
                   const int* kv_length, const int* page_table, int k_stride, int v_stride, int head_pieces,
                   int num_kv_heads, int sequences, int page_shift, int pages_per_sequence) {
    using Piece = Eight<T, E4m3>;
    wait_for_predecessors();
    allow_dependents();
    const long long index = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    const int pieces = num_kv_heads * head_pieces;
    const int token = static_cast<int>(index / pieces);
    const int piece = static_cast<int>(index % pieces);
    if (token >= query_start[sequences]) return;
    const long long place = place_of(token, piece, query_start, kv_length, page_table, head_pieces, num_kv_heads,
                                     sequences, page_shift, pages_per_sequence);
    k_cache[place] = Piece::store(__ldcg(k + static_cast<long long>(token) * k_stride + piece));
    v_cache[place] = Piece::store(__ldcg(v + static_cast<long long>(token) * v_stride + piece));
}

}  // namespace trtc
