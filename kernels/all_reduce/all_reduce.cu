// Sum over the GPUs of a host. In one step: each writes its part into the memory of all others, and adds what it gets. Or in
// two: each adds one piece of all parts and writes the sum into the memory of all others, for which it sends less.
//
// Data travels in packets of 16 bytes: two words of 8 bytes, each 4 bytes of data and 4 of the number of this sum. A word is
// written and read at once, so that its number says that its data has come: no fence, no flag beside it, no barrier (the
// protocol is that of NCCL's LL). Numbers never return, so that nothing is cleared.
//
// A GPU has room for two sums from each GPU, used in turn. That is enough: it writes sum n + 2 once it has everything of sum
// n + 1 from all, and they send that when their kernel of sum n, which read the same room, has ended. So in two steps, where
// whoever sends a sum has something from all; the two ways have rooms of their own and count sums together.
#include "common/async.cuh"
#include "common/types.cuh"

namespace trtc {

constexpr int kMaxRanks = 8;

struct alignas(16) Packet {
    uint64 word[2];
};

__device__ __forceinline__ uint64 stamped(uint32 data, uint32 number) {
    return static_cast<uint64>(number) << 32 | data;
}

__device__ __forceinline__ void send(Packet* to, uint32 first, uint32 second, uint32 number) {
    asm volatile("st.volatile.global.v2.u64 [%0], {%1, %2};\n" ::"l"(__cvta_generic_to_global(to)),
                 "l"(stamped(first, number)), "l"(stamped(second, number))
                 : "memory");
}

// Waits for the packet of sum `number`.
__device__ __forceinline__ uint2 receive(const Packet* from, uint32 number) {
    uint64 first, second;
    do {
        asm volatile("ld.volatile.global.v2.u64 {%0, %1}, [%2];\n"
                     : "=l"(first), "=l"(second)
                     : "l"(__cvta_generic_to_global(from))
                     : "memory");
    } while (static_cast<uint32>(first >> 32) != number || static_cast<uint32>(second >> 32) != number);
    return make_uint2(static_cast<uint32>(first), static_cast<uint32>(second));
}

// Where the packets of a sum from one rank lie: [2 sums][kRanks][2 halves of a vector][capacity].
template <int kRanks>
__device__ __forceinline__ size_t place(uint32 number, int from, int capacity) {
    return static_cast<size_t>((number & 1) * kRanks + from) * 2 * capacity;
}

__device__ __forceinline__ void send_vector(Packet* to, int capacity, uint4 bits, uint32 number) {
    send(to, bits.x, bits.y, number);
    send(to + capacity, bits.z, bits.w, number);
}

__device__ __forceinline__ uint4 receive_vector(const Packet* from, int capacity, uint32 number) {
    const uint2 low = receive(from, number), high = receive(from + capacity, number);
    return make_uint4(low.x, low.y, high.x, high.y);
}

template <typename T>
__device__ __forceinline__ void add(float (&sum)[Vector<T>::kSize], uint4 bits) {
    float part[Vector<T>::kSize];
    unpack(*reinterpret_cast<const Vector<T>*>(&bits), part);
#pragma unroll
    for (int k = 0; k < Vector<T>::kSize; ++k) sum[k] += part[k];
}

__device__ __forceinline__ uint32 next_number(const uint32* state) {
    const uint32 last = __ldcg(state);
    return last + 1 == 0 ? 2 : last + 1;  // memory starts with zeros; rooms keep taking turns
}

// The last block of a sum notes its number.
__device__ __forceinline__ void finish(uint32* state, uint32 number) {
    __syncthreads();
    if (threadIdx.x == 0 && atomicAdd(state + 1, 1u) == gridDim.x - 1) {
        state[1] = 0;
        state[0] = number;
    }
}

#define MEMORY_PARAMETERS                                                                                 \
    Packet *memory0, Packet *memory1, Packet *memory2, Packet *memory3, Packet *memory4, Packet *memory5, \
        Packet *memory6, Packet *memory7
#define MEMORY_ARGUMENTS \
    {memory0, memory1, memory2, memory3, memory4, memory5, memory6, memory7}

// y, x: `vectors` of 16 bytes, y may be x; sums are float32 in the order of ranks, rounded once: the same bits everywhere.
// memory0 ...: where the packets of each rank lie; here: this one's. state: the number of the last sum, blocks that are done.
template <typename T, int kRanks>
__global__ void all_reduce(T* y, const T* x, MEMORY_PARAMETERS, const Packet* here, uint32* state, int rank, int vectors,
                           int capacity) {
    static_assert(kRanks >= 2 && kRanks <= kMaxRanks);
    constexpr int kSize = Vector<T>::kSize;
    Packet* const memory[kMaxRanks] = MEMORY_ARGUMENTS;
    allow_dependents();
    wait_for_predecessors();

    const uint32 number = next_number(state);
    const int first = blockIdx.x * blockDim.x + threadIdx.x;
    const int stride = gridDim.x * blockDim.x;
    const size_t mine = place<kRanks>(number, rank, capacity);
    for (int i = first; i < vectors; i += stride) {
        const uint4 own = __ldcg(reinterpret_cast<const uint4*>(x) + i);
#pragma unroll
        for (int peer = 0; peer < kRanks; ++peer) {
            if (peer == rank) continue;
            send_vector(memory[peer] + mine + i, capacity, own, number);
        }
    }
    for (int i = first; i < vectors; i += stride) {
        float sum[kSize] = {};
#pragma unroll
        for (int from = 0; from < kRanks; ++from) {
            add<T>(sum, from == rank ? __ldcg(reinterpret_cast<const uint4*>(x) + i)
                                     : receive_vector(here + place<kRanks>(number, from, capacity) + i, capacity, number));
        }
        store_vector(y + static_cast<size_t>(i) * kSize, pack<T>(sum));
    }
    finish(state, number);
}

// The same sum in two steps. GPU r adds piece r of all parts: `piece` vectors from r * piece on. Its memory
// holds the packets of pieces as `place` says with `capacity`, and behind them, likewise, those of sums.
template <typename T, int kRanks>
__global__ void all_reduce_two_shot(T* y, const T* x, MEMORY_PARAMETERS, const Packet* here, uint32* state, int rank, int vectors,
                                    int capacity) {
    static_assert(kRanks >= 2 && kRanks <= kMaxRanks);
    constexpr int kSize = Vector<T>::kSize;
    Packet* const memory[kMaxRanks] = MEMORY_ARGUMENTS;
    allow_dependents();
    wait_for_predecessors();

    const uint32 number = next_number(state);
    const int first = blockIdx.x * blockDim.x + threadIdx.x;
    const int stride = gridDim.x * blockDim.x;
    const int piece = (vectors + kRanks - 1) / kRanks;
    const size_t mine = place<kRanks>(number, rank, capacity);
    const size_t sums = static_cast<size_t>(2 * kRanks) * 2 * capacity;
    // A thread has the same vectors of every piece in all three loops: y may be x.
    for (int i = first; i < piece; i += stride) {
#pragma unroll
        for (int peer = 0; peer < kRanks; ++peer) {
            const int at = peer * piece + i;
            if (peer == rank || at >= vectors) continue;
            send_vector(memory[peer] + mine + i, capacity, __ldcg(reinterpret_cast<const uint4*>(x) + at), number);
        }
    }
    for (int i = first; i < piece && rank * piece + i < vectors; i += stride) {
        float sum[kSize] = {};
#pragma unroll
        for (int from = 0; from < kRanks; ++from) {
            add<T>(sum, from == rank ? __ldcg(reinterpret_cast<const uint4*>(x) + rank * piece + i)
                                     : receive_vector(here + place<kRanks>(number, from, capacity) + i, capacity, number));
        }
        const Vector<T> total = pack<T>(sum);
        store_vector(y + static_cast<size_t>(rank * piece + i) * kSize, total);
        const uint4 bits = *reinterpret_cast<const uint4*>(&total);
#pragma unroll
        for (int peer = 0; peer < kRanks; ++peer) {
            if (peer != rank) send_vector(memory[peer] + sums + mine + i, capacity, bits, number);
        }
    }
    for (int i = first; i < piece; i += stride) {
#pragma unroll
        for (int from = 0; from < kRanks; ++from) {
            const int at = from * piece + i;
            if (from == rank || at >= vectors) continue;
            const uint4 bits = receive_vector(here + sums + place<kRanks>(number, from, capacity) + i, capacity, number);
            store_vector(y + static_cast<size_t>(at) * kSize, *reinterpret_cast<const Vector<T>*>(&bits));
        }
    }
    finish(state, number);
}

}  // namespace trtc
