// How the GPUs of a host give each other lines of 128 bytes over NVLink: seven vectors and, in the place of the eighth, the number
// of the sum. The eight threads of a team write a line in one instruction, and read it in one; NVLink and L2 move such a line at
// once, so that its number says that all of it has come (the protocol is that of NCCL's LL128, which PCIe does not keep). Packets,
// whose every 8 bytes have a number, send 2 bytes for one, lines 1.14.
//
// A line's number has a place of its own, where data never lies: lines have rooms that packets do not use, two as they do.
#pragma once
#include "all_reduce/packets.cuh"

namespace trtc {

constexpr int kLineThreads = 8;
constexpr int kLineVectors = 7;

// A thread's 16 bytes of lines. Whole warps call everything, with conditions as arguments, so that a team stays together.
// `capacity` of the exchange: lines that there is room for from each GPU.
template <int kRanks>
struct Lines {
    const Exchange<kRanks>& exchange;
    const int team = threadIdx.x / kLineThreads, lane = threadIdx.x % kLineThreads;

    // Where the lines from one GPU begin: [parts, sums][2 sums][kRanks][capacity].
    __device__ __forceinline__ uint32 parts(int from) const { return exchange.room(from) * (kLineThreads / 2) + lane; }
    __device__ __forceinline__ uint32 sums(int from) const { return parts(from) + 2 * kRanks * kLineThreads * exchange.capacity; }

    // Gives the vectors of each team that `sends` as a line; what the eighth thread has is lost.
    __device__ __forceinline__ void give(Packet* to, uint4 bits, bool sends) const {
        const uint32 number = exchange.number;
        if (lane == kLineVectors) bits = make_uint4(number, number, number, number);
        asm volatile(
            "{\n.reg .pred p;\nsetp.ne.u32 p, %5, 0;\n@p st.volatile.global.v4.u32 [%0], {%1, %2, %3, %4};\n}\n" ::"l"(
                __cvta_generic_to_global(to)),
            "r"(bits.x), "r"(bits.y), "r"(bits.z), "r"(bits.w), "r"(static_cast<uint32>(sends))
            : "memory");
    }

    // What is there, for each team that `wants` it.
    __device__ __forceinline__ void look(uint4& seen, const Packet* from, bool wants) const {
        asm volatile(
            "{\n.reg .pred p;\nsetp.ne.u32 p, %5, 0;\n@p ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];\n}\n"
            : "+r"(seen.x), "+r"(seen.y), "+r"(seen.z), "+r"(seen.w)
            : "l"(__cvta_generic_to_global(from)), "r"(static_cast<uint32>(wants))
            : "memory");
    }

    // Looks again until what has been seen is of this sum, for all teams of the warp that want it.
    __device__ __forceinline__ void await(uint4& seen, const Packet* from, bool wants) const {
        while (!__all_sync(~0u, !wants || lane != kLineVectors || seen.x == exchange.number)) look(seen, from, wants);
    }
};

}  // namespace trtc
