// Hopper's tensor copy engine and the barriers in shared memory that count its bytes (sm_90 and later).
//
// Tiles in shared memory are 64 columns of 16-bit elements wide, rows of 128 bytes, in the 128-byte swizzle that wgmma
// knows as well; each starts at a multiple of 1024 bytes.
#pragma once
#include "common/types.cuh"

namespace trtc {

constexpr int kSwizzledColumns = 64;
constexpr int kSwizzledRowBytes = 2 * kSwizzledColumns;

struct alignas(64) TensorMap {
    uint64 opaque[16];
};

// A place in a ring and the parity of its barriers' phase.
struct Slot {
    int index = 0;
    int parity = 0;

    __device__ __forceinline__ void advance(int stages) {
        if (++index == stages) index = 0, parity ^= 1;
    }
};

__device__ __forceinline__ void barrier_init(uint32 barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialized barriers known to the copy engine; a block barrier follows.
__device__ __forceinline__ void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;\n" ::: "memory");
}

// One lane may arrive for its warp behind __syncwarp, but racecheck counts the accesses of the arriving thread alone as done. So
// where a barrier orders what racecheck sees (loads and stores, ldmatrix, cp.async; not wgmma or the copy engine), each lane
// arrives.
__device__ __forceinline__ void barrier_arrive(uint32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_expect(uint32 barrier, uint32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier), "r"(bytes) : "memory");
}

// As barrier_arrive, on the barrier that lies at the same place in the block of rank `rank` of the cluster.
__device__ __forceinline__ void barrier_arrive_in_rank(uint32 barrier, int rank) {
    asm volatile(
        "{\n"
        ".reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
        "}\n" ::"r"(barrier),
        "r"(rank)
        : "memory");
}

// Waits until the phase of parity `parity` is complete.
__device__ __forceinline__ void barrier_wait(uint32 barrier, uint32 parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// As barrier_wait, for what other blocks of the cluster have sent.
__device__ __forceinline__ void barrier_wait_cluster(uint32 barrier, uint32 parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// Writes 16 bytes to this place in the shared memory of the block of rank `rank`, whose barrier counts them.
__device__ __forceinline__ void send_to_rank(uint32 destination, const float4& value, uint32 barrier, int rank) {
    asm volatile(
        "{\n"
        ".reg .b32 there, counter;\n"
        "mapa.shared::cluster.u32 there, %0, %6;\n"
        "mapa.shared::cluster.u32 counter, %1, %6;\n"
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [there], {%2, %3, %4, %5}, [counter];\n"
        "}\n" ::"r"(destination),
        "r"(barrier), "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w), "r"(rank)
        : "memory");
}

// As above, 8 bytes.
__device__ __forceinline__ void send_to_rank(uint32 destination, const float2& value, uint32 barrier, int rank) {
    asm volatile(
        "{\n"
        ".reg .b32 there, counter;\n"
        "mapa.shared::cluster.u32 there, %0, %4;\n"
        "mapa.shared::cluster.u32 counter, %1, %4;\n"
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [there], {%2, %3}, [counter];\n"
        "}\n" ::"r"(destination),
        "r"(barrier), "f"(value.x), "f"(value.y), "r"(rank)
        : "memory");
}

// As above, 4 bytes.
__device__ __forceinline__ void send_to_rank(uint32 destination, float value, uint32 barrier, int rank) {
    asm volatile(
        "{\n"
        ".reg .b32 there, counter;\n"
        "mapa.shared::cluster.u32 there, %0, %3;\n"
        "mapa.shared::cluster.u32 counter, %1, %3;\n"
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [there], %2, [counter];\n"
        "}\n" ::"r"(destination),
        "r"(barrier), "f"(value), "r"(rank)
        : "memory");
}

// Copies the box of `map` at (column, row) to shared memory; `barrier` counts its bytes.
__device__ __forceinline__ void copy_tensor(uint32 destination, const TensorMap& map, int column, int row,
                                            uint32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];\n" ::
            "r"(destination),
        "l"(&map), "r"(column), "r"(row), "r"(barrier)
        : "memory");
}

// As copy_tensor, to the same place in every block of the cluster whose rank is a bit of `ranks`; each one's own
// barrier counts the bytes.
__device__ __forceinline__ void multicast_tensor(uint32 destination, const TensorMap& map, int column, int row,
                                                 uint32 barrier, int ranks) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
        "[%1, {%2, %3}], [%4], %5;\n" ::"r"(destination),
        "l"(&map), "r"(column), "r"(row), "r"(barrier), "h"(static_cast<unsigned short>(ranks))
        : "memory");
}

__device__ __forceinline__ void prefetch_tensor_map(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];\n" ::"l"(&map) : "memory");
}

}  // namespace trtc
