// The most likely token of each row of logits, and the step of a decode loop on the device.
//
// T, the type of the logits: float, __half or __nv_bfloat16.
//
// A row is divided among the blocks of a cluster (sm_90 and later; before, among one), so nothing has to be
// set up in memory before the launch. Ties go to the lowest index and NaN counts as the largest value, as in
// torch.argmax.

#include "common/async.cuh"
#include "common/cluster.cuh"
#include "common/types.cuh"
#include "sampling/loop_state.cuh"
#include "sampling/rank.cuh"

namespace trtc {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxClusterSize = 8;

// The best of the values one thread has seen, in ascending order of their indices.
struct Best {
    uint32 order = 0;
    int index = 0;

    __device__ __forceinline__ void see(float value, int at) {
        const uint32 other = order_of(value);
        if (other > order) order = other, index = at;
    }
};

// logits: rows of `vocab_size` values, `row_stride` apart. Grid (cluster size, rows), clusters along x.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    greedy_tokens(const T* logits, long long row_stride, int vocab_size, LOOP_STATE_PARAMETERS) {
    const LoopState state = LOOP_STATE_ARGUMENTS;
    constexpr int kVector = Vector<T>::kSize;
#if __CUDA_ARCH__ < 1200
    constexpr int kLoads = sizeof(T) == 4 ? 8 : 3;  // 16-byte loads in flight per thread
#else
    constexpr int kLoads = sizeof(T) == 4 ? 6 : 3;  // more would spill there
#endif
    __shared__ Rank warp_ranks[kWarps];
    __shared__ Rank block_ranks[kMaxClusterSize];
    const int row = blockIdx.y;
    const int block = cluster_rank();
    const int blocks = cluster_size();
    cluster_arrive();
    wait_for_predecessors();
    const T* const values = logits + row * row_stride;

    const bool decides = block == 0 && threadIdx.x == 0;
    const LoopRow before =
        decides ? load_row(state, row) : LoopRow();  // early: its latency is hidden by the scan

    Best seen;
    // Up to the first 16-byte boundary, and after the last, element by element.
    const int misaligned = static_cast<int>(reinterpret_cast<unsigned long long>(values) % 16 / sizeof(T));
    const int head = min(vocab_size, misaligned ? kVector - misaligned : 0);
    const int vectors = (vocab_size - head) / kVector;
    const int tail = head + vectors * kVector;
    if (block == 0 && static_cast<int>(threadIdx.x) < head)
        seen.see(to_float(values[threadIdx.x]), threadIdx.x);
    for (int first = block * kThreads + threadIdx.x; first < vectors; first += blocks * kThreads * kLoads) {
        Vector<T> loaded[kLoads];
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
            const int vector = first + i * blocks * kThreads;
            if (vector < vectors) loaded[i] = load_vector_cg(values + head + vector * kVector);
        }
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
            const int vector = first + i * blocks * kThreads;
            if (vector >= vectors) break;
            float elements[kVector];
            unpack(loaded[i], elements);
#pragma unroll
            for (int j = 0; j < kVector; ++j) seen.see(elements[j], head + vector * kVector + j);
        }
    }
    if (block == 0 && tail + static_cast<int>(threadIdx.x) < vocab_size)
        seen.see(to_float(values[tail + threadIdx.x]), tail + threadIdx.x);

    Rank best = warp_best(rank_of(seen.order, seen.index));
    if (threadIdx.x % 32 == 0) warp_ranks[threadIdx.x / 32] = best;
    __syncthreads();
    cluster_wait();
    if (threadIdx.x < 32) {
        best = warp_best(threadIdx.x < kWarps ? warp_ranks[threadIdx.x] : 0);
        if (threadIdx.x == 0) in_rank(block_ranks, 0)[block] = best;
    }
    cluster_sync();
    if (decides && before.is_used()) {
        for (int i = 0; i < blocks; ++i) best = better(best, block_ranks[i]);
        advance_row(state, row, before, index_of(best));
    }
}

// The step of the loop alone, for tokens chosen elsewhere (they are in state.next_token).
__global__ void advance(int rows, LOOP_STATE_PARAMETERS) {
    const LoopState state = LOOP_STATE_ARGUMENTS;
    wait_for_predecessors();
    const int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    const LoopRow before = load_row(state, row);
    if (before.is_used()) advance_row(state, row, before, state.next_token[row]);
}

}  // namespace trtc
