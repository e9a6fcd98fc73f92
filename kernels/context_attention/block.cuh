// What both context attention kernels share: which query rows a block has, and where tokens lie in the cache.
#pragma once
#include "common/fp8.cuh"
#include "common/paged.cuh"
#include "common/types.cuh"

namespace trtc {

// Over the 4 lanes that share a row of an accumulator.
__device__ __forceinline__ float row_max(float value) {
    value = fmaxf(value, __shfl_xor_sync(~0u, value, 1));
    return fmaxf(value, __shfl_xor_sync(~0u, value, 2));
}

__device__ __forceinline__ float row_sum(float value) {
    value += __shfl_xor_sync(~0u, value, 1);
    return value + __shfl_xor_sync(~0u, value, 2);
}

struct Block {
    int sequence;     // -1: a surplus slot
    int first_row;    // of this block, counted within the sequence's new tokens
    int first_token;  // packed row of the sequence's first new token
    int new_tokens;
    int past;  // tokens of the sequence that are in the cache already
};

// Finds the sequence of a slot: slots are dealt to sequences in order, the last (longest) rows of each first.
template <int kRows>
__device__ __forceinline__ Block block_of(int slot, const int* query_start, const int* kv_length,
                                          int sequences) {
    const int lane = threadIdx.x & 31;
    int before = 0;
    for (int base = 0; base < sequences; base += 32) {
        const int sequence = base + lane;
        int start = 0, tokens = 0, length = 0;
        if (sequence < sequences) {
            start = query_start[sequence];
            tokens = query_start[sequence + 1] - start;
            length = kv_length[sequence];
        }
        const int blocks = (tokens + kRows - 1) / kRows;
        int end = blocks;
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
            const int other = __shfl_up_sync(~0u, end, distance);
            if (lane >= distance) end += other;
        }
        const uint32 after = __ballot_sync(~0u, before + end > slot);
        if (after) {
            const int owner = __ffs(after) - 1;
            const int first = (before + __shfl_sync(~0u, end, owner) - 1 - slot) * kRows;
            start = __shfl_sync(~0u, start, owner);
            tokens = __shfl_sync(~0u, tokens, owner);
            return {base + owner, first, start, tokens, __shfl_sync(~0u, length, owner) - tokens};
        }
        before += __shfl_sync(~0u, end, 31);
    }
    return {-1, 0, 0, 0, 0};
}

// Rows of one sequence in the paged cache, for one kv head.
template <int kHeadDim>
struct CacheRows {
    const int* pages;  // of the sequence
    int page_shift;
    HeadRows<kHeadDim> head;

    __device__ __forceinline__ long long offset(int position) const {
        return head.offset(pages[position >> page_shift], position);
    }
};

// Eight elements in shared memory, as this thread copied them there: of a token in the cache, 8 bytes of e4m3 numbers,
// which become elements; of a new one, elements, which are rounded to e4m3 numbers.
template <typename T>
__device__ __forceinline__ void round_piece(unsigned char* place, bool is_past) {
    using Piece = Eight<T, E4m3>;
    uint4& elements = *reinterpret_cast<uint4*>(place);
    uint2 stored = *reinterpret_cast<const uint2*>(place);
    if (!is_past) stored = Piece::store(elements);
    elements = Piece::load(stored);
}

}  // namespace trtc
