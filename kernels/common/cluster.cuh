// Thread block clusters (sm_90 and later). Before sm_90, and in kernels launched without clusters, a block is
// a cluster of one and everything here still works.
#pragma once

namespace trtc {

// All blocks of the cluster meet; what any thread wrote before, to its own or to another block's shared
// memory, is visible after. Split in two so that work can be done between; every thread calls both.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release;\n" ::: "memory");
#endif
}

// As cluster_arrive, for an order of events alone: what was written before need not be visible after. Cheaper, because
// it waits for no writes.
__device__ __forceinline__ void cluster_arrive_relaxed() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.relaxed;\n" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire;\n" ::: "memory");
#else
    __syncthreads();
#endif
}

__device__ __forceinline__ void cluster_sync() {
    cluster_arrive();
    cluster_wait();
}

__device__ __forceinline__ int cluster_rank() {
#if __CUDA_ARCH__ >= 900
    unsigned int rank;
    asm("mov.u32 %0, %%cluster_ctarank;\n" : "=r"(rank));
    return static_cast<int>(rank);
#else
    return 0;
#endif
}

__device__ __forceinline__ int cluster_size() {
#if __CUDA_ARCH__ >= 900
    unsigned int size;
    asm("mov.u32 %0, %%cluster_nctarank;\n" : "=r"(size));
    return static_cast<int>(size);
#else
    return 1;
#endif
}

// This block's shared variable, as it lies in the block of rank `rank` of the cluster.
template <typename T>
__device__ __forceinline__ T* in_rank(T* variable, int rank) {
#if __CUDA_ARCH__ >= 900
    unsigned long long address;
    asm("mapa.u64 %0, %1, %2;\n" : "=l"(address) : "l"(variable), "r"(rank));
    return reinterpret_cast<T*>(address);
#else
    return variable;
#endif
}

}  // namespace trtc
