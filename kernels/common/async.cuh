// Asynchronous copies to shared memory and programmatic dependent launch.
#pragma once

namespace trtc {

__device__ __forceinline__ unsigned int shared_address(const void* pointer) {
    return static_cast<unsigned int>(__cvta_generic_to_shared(pointer));
}

// Copies 16 bytes past L1 to shared memory, or writes zeros when `valid` is false (then nothing is read).
__device__ __forceinline__ void copy_async_16(unsigned int destination, const void* source, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(destination),
                 "l"(__cvta_generic_to_global(source)), "r"(valid ? 16 : 0)
                 : "memory");
}

// As copy_async_16, for 8 bytes.
__device__ __forceinline__ void copy_async_8(unsigned int destination, const void* source, bool valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;\n" ::"r"(destination),
                 "l"(__cvta_generic_to_global(source)), "r"(valid ? 8 : 0)
                 : "memory");
}

// As copy_async_16, for 4 bytes, of which the first `bytes` are copied and the others become zero.
__device__ __forceinline__ void copy_async_4(unsigned int destination, const void* source, int bytes) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(destination),
                 "l"(__cvta_generic_to_global(source)), "r"(bytes)
                 : "memory");
}

// As copy_async_16, for data read once: asks L2 for the whole 128-byte line at the first touch.
__device__ __forceinline__ void stream_async_16(unsigned int destination, const void* source, bool valid) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(destination),
                 "l"(__cvta_generic_to_global(source)), "r"(valid ? 16 : 0)
                 : "memory");
}

__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits until at most `kPending` of this thread's latest groups are unfinished.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// Arrives at an mbarrier, which counts it as any other arrival, when this thread's copies up to here have landed.
__device__ __forceinline__ void copy_async_arrive(unsigned int barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];\n" ::"r"(barrier) : "memory");
}

// Brings the line of `pointer` to L2, for a later read.
__device__ __forceinline__ void prefetch_l2(const void* pointer) {
    asm volatile("prefetch.global.L2 [%0];\n" ::"l"(__cvta_generic_to_global(pointer)));
}

// Lets the next kernel of the stream start (its launch must be `dependent`); it still waits for this grid's end
// before it touches what this grid writes.
__device__ __forceinline__ void allow_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

// Waits until all kernels this one depends on have ended and their writes are visible.
__device__ __forceinline__ void wait_for_predecessors() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

}  // namespace trtc
