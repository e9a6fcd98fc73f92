// Sum over the GPUs of a host, with a residual, and the norm of the sum:
//   total = sum of x over the ranks + residual;  normed = (total - mean) / sqrt(variance + epsilon) * scale + shift
// A cluster of blocks makes a row at a time, a vector a thread; it has sent its part of the next row before it waits for those
// of this one. All GPUs make all norms, of the same bits: a norm costs less than sending it.
#include "all_reduce/packets.cuh"
#include "common/cluster.cuh"
#include "common/norm_row.cuh"

namespace trtc {

constexpr int kMaxRowBlocks = 8;

// The moments of a row of which each block of the cluster holds a part. slots: shared, those of the row before last.
__device__ __forceinline__ Moments row_moments(const Moments& mine, int columns, Moments (&slots)[kMaxRowBlocks]) {
    const int blocks = cluster_size();
    if (blocks == 1) return mine;
    if (threadIdx.x < blocks) *in_rank(&slots[cluster_rank()], threadIdx.x) = mine;
    cluster_sync();
    float mean = 0.f, deviation = 0.f;
    for (int i = 0; i < blocks; ++i) mean += slots[i].count * slots[i].mean;
    mean /= columns;
    for (int i = 0; i < blocks; ++i) {
        const float distance = slots[i].mean - mean;
        deviation += slots[i].deviation + slots[i].count * distance * distance;
    }
    return {static_cast<float>(columns), mean, deviation};
}

// normed, total, x, residual: [rows, columns]; scale, shift: [columns]. total, residual, scale and shift may be null; total may
// be x or residual, which is the same on all ranks. columns is a multiple of 16 / sizeof(T); every block of a cluster has
// `block_columns` of them, the last what is left, a vector a thread. The sum is float32 in the order of ranks, the residual
// last, rounded once.
//
// In two steps (kTwoShot), row r is summed by GPU r % kRanks, which gives the sum to the others.
template <typename T, int kRanks, bool kRms, bool kTwoShot>
__global__ void __maxnreg__(kRanks == 2 ? 64 : 88)  // a block leaves room for one of the product that starts under it
    all_reduce_norm(T* normed, T* total, const T* x, const T* residual, const T* scale, const T* shift, MEMORY_PARAMETERS,
                    uint32* state, int rank, int rows, int columns, int block_columns, int capacity, float epsilon) {
    constexpr int kSize = Vector<T>::kSize;
    __shared__ Moments warp_moments[2][kMaxNormWarps];
    __shared__ Moments block_slots[2][kMaxRowBlocks];
    Packet* const memory[kMaxRanks] = MEMORY_ARGUMENTS;
    const int before = cluster_rank() * block_columns;  // columns of other blocks
    const int own_columns = min(block_columns, columns - before);
    const int held = held_vectors<T, 1>(own_columns);
    const int vectors = columns / kSize, at = before / kSize + threadIdx.x;
    const int step = gridDim.x / cluster_size();
    const int first_row = blockIdx.x / cluster_size();

    cluster_arrive_relaxed();  // the others of the cluster have started before anything is written to their memory
    // The parameters are nobody's output: they come near before the wait.
    if (scale) scale += before;
    if (shift) shift += before;
    if (scale && held) prefetch_l2(scale + norm_column<T>(0));
    if (shift && held) prefetch_l2(shift + norm_column<T>(0));
    Exchange<kRanks> exchange(capacity);
    exchange.count(state);
    cluster_wait();

    const auto load = [&](const T* tensor, int row) {
        return __ldcg(reinterpret_cast<const uint4*>(tensor) + static_cast<size_t>(row) * vectors + at);
    };
    // Where in a room the packets of a row begin.
    const auto place = [&](int row) { return static_cast<uint32>(kTwoShot ? row / kRanks : row) * vectors + at; };
    const auto give_part = [&](int row) {
        if (row >= rows || !held || (kTwoShot && row % kRanks == rank)) return;
        const uint4 own = load(x, row);
#pragma unroll
        for (int peer = 0; peer < kRanks; ++peer) {
            if (peer == rank || (kTwoShot && peer != row % kRanks)) continue;
            exchange.give(memory[peer] + (exchange.room(rank) + place(row)), own);
        }
    };

    const auto take = [&](const Packet* from) { return exchange.take(exchange.look_at(from), from); };

    give_part(first_row);
    exchange.count_block(state);
    int turn = 0;
    for (int row = first_row; row < rows; row += step) {
        give_part(row + step);
        uint4 rounded{};
        if (!held) {
            // This thread helps to reduce.
        } else if (!kTwoShot || row % kRanks == rank) {
            const uint4 own = load(x, row);  // while the parts of others are on their way
            const uint4 added = !kTwoShot && residual ? load(residual, row) : uint4{};
            float sum[kSize] = {};
#pragma unroll
            for (int from = 0; from < kRanks; ++from) {
                add<T>(sum, from == rank ? own : take(here + (exchange.room(from) + place(row))));
            }
            if (residual) add<T>(sum, kTwoShot ? load(residual, row) : added);  // registers are scarce in two steps
            rounded = bits_of(pack<T>(sum));
#pragma unroll
            for (int peer = 0; kTwoShot && peer < kRanks; ++peer) {
                if (peer != rank) exchange.give(memory[peer] + (exchange.sums() + exchange.room(rank) + place(row)), rounded);
            }
        } else {
            rounded = take(here + (exchange.sums() + exchange.room(row % kRanks) + place(row)));
        }

        const NormParameters<T, 1> parameters(scale, shift, held);  // while the block reduces
        const size_t start = static_cast<size_t>(row) * columns + before;
        const Vector<T> sum = *reinterpret_cast<const Vector<T>*>(&rounded);
        if (total && held) store_vector(total + start + norm_column<T>(0), sum);
        float value[1][kSize];
        unpack(sum, value[0]);  // the norm is that of the sum as stored
        const Moments part = block_moments<T, 1, kRms>(value, held, own_columns, warp_moments[turn]);
        const Moments moments = row_moments(part, columns, block_slots[turn]);
        store_normed(normed + start, value, held, parameters, moments, columns, epsilon);
        turn ^= 1;
    }
}

}  // namespace trtc
