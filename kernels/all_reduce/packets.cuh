// How the GPUs of a host give each other vectors of 16 bytes: through memory that each lends to all.
//
// Data travels in packets of 16 bytes: two words of 8 bytes, each 4 bytes of data and 4 of the number of this sum. A word is
// written and read at once, so that its number says that its data has come: no fence, no flag beside it, no barrier (the
// protocol is that of NCCL's LL). Numbers never return, so that nothing is cleared.
//
// A GPU has room for two sums from each GPU, used in turn. That is enough: it writes sum n + 2 once it has everything of sum
// n + 1 from all, and they send that when their kernel of sum n, which read the same room, has ended. So in two steps
// (two_shot.cu), where whoever sends a sum has something from all; the two ways have rooms of their own and count sums together.
#pragma once
#include "common/async.cuh"
#include "common/types.cuh"

namespace trtc {

constexpr int kMaxRanks = 8;

struct alignas(16) Packet {
    uint64 word[2];
};

// Of a vector.
struct Halves {
    Packet low, high;
};

__device__ __forceinline__ uint64 stamped(uint32 data, uint32 number) {
    return static_cast<uint64>(number) << 32 | data;
}

__device__ __forceinline__ bool has_number(const Packet& packet, uint32 number) {
    return static_cast<uint32>(packet.word[0] >> 32) == number && static_cast<uint32>(packet.word[1] >> 32) == number;
}

__device__ __forceinline__ void send(Packet* to, uint32 first, uint32 second, uint32 number) {
    asm volatile("st.volatile.global.v2.u64 [%0], {%1, %2};\n" ::"l"(__cvta_generic_to_global(to)),
                 "l"(stamped(first, number)), "l"(stamped(second, number))
                 : "memory");
}

__device__ __forceinline__ Packet look(const Packet* from) {
    Packet packet;
    asm volatile("ld.volatile.global.v2.u64 {%0, %1}, [%2];\n"
                 : "=l"(packet.word[0]), "=l"(packet.word[1])
                 : "l"(__cvta_generic_to_global(from))
                 : "memory");
    return packet;
}

// The packets of a sum of kRanks GPUs, on one of them. `capacity`: vectors that it has room for from each.
template <int kRanks>
struct Exchange {
    static_assert(kRanks >= 2 && kRanks <= kMaxRanks);

    uint32 number;
    int capacity;

    // Waits for the kernels before this one.
    __device__ __forceinline__ explicit Exchange(int capacity) : capacity(capacity) {
        allow_dependents();
        wait_for_predecessors();
    }

    // The number of this sum. To be called behind the first loads of data, so that all are on their way together. state: the
    // number of the last sum, blocks that have it. Memory starts with zeros; rooms keep taking turns.
    __device__ __forceinline__ void count(const uint32* state) {
        const uint32 last = __ldcg(state);
        number = last + 1 == 0 ? 2 : last + 1;
    }

    // Where the packets from one GPU begin: [2 sums][kRanks][2 halves of a vector][capacity].
    __device__ __forceinline__ uint32 room(int from) const { return ((number & 1) * kRanks + from) * 2 * capacity; }

    // Where, behind the rooms of parts, those of sums begin, for sums in two steps.
    __device__ __forceinline__ uint32 sums() const { return 2 * kRanks * 2 * capacity; }

    __device__ __forceinline__ void give(Packet* to, uint4 bits) const {
        send(to, bits.x, bits.y, number);
        send(to + capacity, bits.z, bits.w, number);
    }

    __device__ __forceinline__ Halves look_at(const Packet* from) const { return {look(from), look(from + capacity)}; }

    // The vector of which `seen` is what was there: looks again until it has come.
    __device__ __forceinline__ uint4 take(Halves seen, const Packet* from) const {
        while (!has_number(seen.low, number) || !has_number(seen.high, number)) seen = look_at(from);
        return make_uint4(static_cast<uint32>(seen.low.word[0]), static_cast<uint32>(seen.low.word[1]),
                          static_cast<uint32>(seen.high.word[0]), static_cast<uint32>(seen.high.word[1]));
    }

    // Every thread of every block calls it once, while data is on its way: the last block to have the number notes it for the
    // next sum.
    __device__ __forceinline__ void count_block(uint32* state) const {
        __syncthreads();
        if (threadIdx.x == 0 && atomicAdd(state + 1, 1u) == gridDim.x - 1) {
            state[1] = 0;
            state[0] = number;
        }
    }
};

template <typename T>
__device__ __forceinline__ void add(float (&sum)[Vector<T>::kSize], uint4 bits) {
    float part[Vector<T>::kSize];
    unpack(*reinterpret_cast<const Vector<T>*>(&bits), part);
#pragma unroll
    for (int k = 0; k < Vector<T>::kSize; ++k) sum[k] += part[k];
}

template <typename T>
__device__ __forceinline__ uint4 bits_of(const Vector<T>& vector) {
    return *reinterpret_cast<const uint4*>(&vector);
}

// What peer k of kRanks - 1 is called on `rank`: all ranks give to different ones at a time.
template <int kRanks>
__device__ __forceinline__ int peer_of(int rank, int k) {
    return rank + 1 + k < kRanks ? rank + 1 + k : rank + 1 + k - kRanks;
}

// memory[peer], where `peer` is not known when this is compiled, without a copy of the array in local memory.
template <int kRanks>
__device__ __forceinline__ Packet* memory_of(Packet* const (&memory)[kMaxRanks], int peer) {
    Packet* found = memory[0];
#pragma unroll
    for (int other = 1; other < kRanks; ++other) found = peer == other ? memory[other] : found;
    return found;
}

// memory0 ...: where the packets of each rank lie; here: this one's.
#define MEMORY_PARAMETERS                                                                                 \
    Packet *memory0, Packet *memory1, Packet *memory2, Packet *memory3, Packet *memory4, Packet *memory5, \
        Packet *memory6, Packet *memory7, const Packet *here
#define MEMORY_ARGUMENTS \
    {memory0, memory1, memory2, memory3, memory4, memory5, memory6, memory7}

}  // namespace trtc
