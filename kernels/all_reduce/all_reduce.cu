// Sum over the GPUs of a host in one step: each writes its part into the memory of all others, and adds what it gets, in float32 in
// the order of ranks, rounded once: the same bits everywhere. How vectors travel: packets.cuh.
#include "all_reduce/packets.cuh"

namespace trtc {

// y, x: `vectors` of 16 bytes, y may be x. state: see Exchange.
template <typename T, int kRanks>
__global__ void all_reduce(T* y, const T* x, MEMORY_PARAMETERS, uint32* state, int rank, int vectors, int capacity) {
    constexpr int kSize = Vector<T>::kSize;
    Packet* const memory[kMaxRanks] = MEMORY_ARGUMENTS;
    Exchange<kRanks> exchange(capacity);
    const int first = blockIdx.x * blockDim.x + threadIdx.x;
    const int stride = gridDim.x * blockDim.x;
    const auto load = [&](int i) { return i < vectors ? __ldcg(reinterpret_cast<const uint4*>(x) + i) : uint4{}; };
    uint4 next = load(first);
    exchange.count(state);
    for (int i = first; i < vectors; i += stride) {
        const uint4 own = next;
        next = load(i + stride);
#pragma unroll
        for (int k = 0; k < kRanks - 1; ++k) {
            exchange.give(memory_of<kRanks>(memory, peer_of<kRanks>(rank, k)) + exchange.room(rank) + i, own);
        }
    }
    exchange.count_block(state);
    for (int i = first; i < vectors; i += stride) {
        Halves seen[kRanks];  // of all at once: each look takes as long as the way to L2 and back
#pragma unroll
        for (int from = 0; from < kRanks; ++from) {
            if (from != rank) seen[from] = exchange.look_at(here + exchange.room(from) + i);
        }
        const uint4 own = load(i);
        float sum[kSize] = {};
#pragma unroll
        for (int from = 0; from < kRanks; ++from) {
            add<T>(sum, from == rank ? own : exchange.take(seen[from], here + exchange.room(from) + i));
        }
        store_vector(y + static_cast<size_t>(i) * kSize, pack<T>(sum));
    }
}

// The same sum in two steps. GPU r adds piece r of all parts: `piece` vectors from r * piece on. Its memory holds the packets
// of pieces in rooms of `capacity`, and behind them, likewise, those of sums.
template <typename T, int kRanks>
__global__ void all_reduce_two_shot(T* y, const T* x, MEMORY_PARAMETERS, uint32* state, int rank, int vectors, int capacity) {
    constexpr int kSize = Vector<T>::kSize;
    Packet* const memory[kMaxRanks] = MEMORY_ARGUMENTS;
    Exchange<kRanks> exchange(capacity);
    exchange.count(state);
    const int first = blockIdx.x * blockDim.x + threadIdx.x;
    const int stride = gridDim.x * blockDim.x;
    const int piece = (vectors + kRanks - 1) / kRanks;
    const uint32 mine = exchange.room(rank), sums = exchange.sums();
    const auto take = [&](const Packet* from) { return exchange.take(exchange.look_at(from), from); };
    // A thread has the same vectors of every piece in all three loops: y may be x.
    for (int i = first; i < piece; i += stride) {
#pragma unroll
        for (int peer = 0; peer < kRanks; ++peer) {
            const int at = peer * piece + i;
            if (peer == rank || at >= vectors) continue;
            exchange.give(memory[peer] + mine + i, __ldcg(reinterpret_cast<const uint4*>(x) + at));
        }
    }
    exchange.count_block(state);
    for (int i = first; i < piece && rank * piece + i < vectors; i += stride) {
        float sum[kSize] = {};
#pragma unroll
        for (int from = 0; from < kRanks; ++from) {
            add<T>(sum, from == rank ? __ldcg(reinterpret_cast<const uint4*>(x) + rank * piece + i)
                                     : take(here + exchange.room(from) + i));
        }
        const Vector<T> total = pack<T>(sum);
        store_vector(y + static_cast<size_t>(rank * piece + i) * kSize, total);
#pragma unroll
        for (int peer = 0; peer < kRanks; ++peer) {
            if (peer != rank) exchange.give(memory[peer] + sums + mine + i, bits_of(total));
        }
    }
    for (int i = first; i < piece; i += stride) {
#pragma unroll
        for (int from = 0; from < kRanks; ++from) {
            const int at = from * piece + i;
            if (from == rank || at >= vectors) continue;
            const uint4 bits = take(here + sums + exchange.room(from) + i);
            store_vector(y + static_cast<size_t>(at) * kSize, *reinterpret_cast<const Vector<T>*>(&bits));
        }
    }
}

}  // namespace trtc
