// context_attention.cu as TensorRT calls a kernel of an ahead-of-time plugin: addresses of the inputs, int32 scalars,
// addresses of the outputs. The caches are inputs and, at the same addresses, outputs.
//
// Template parameters: those of context_attention, with one tile of 16 query rows a warp. One kernel serves prompts, chunks
// of prompts and single new tokens, so that one plugin is right for every optimization profile.

#include "common/async.cuh"
#include "common/fp8.cuh"
#include "common/softmax_tiles.cuh"
#include "context_attention/block.cuh"

namespace trtc {

constexpr int kBlockThreads = 128;

template <typename T, int kHeadDim, int kRowTiles, int kKeys, bool kHalfAccumulation, typename C>
__device__ void context_attention(const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ v, C* k_cache,
                                  C* v_cache, const int* __restrict__ query_start, const int* __restrict__ kv_length,
                                  const int* __restrict__ page_table, T* __restrict__ out, int q_stride, int k_stride,
                                  int v_stride, int out_stride, int sequences, int num_kv_heads, int group, int page_shift,
                                  int pages_per_sequence, float scale_log2, int append);

// q, out: [tokens, num_kv_heads * group, kHeadDim]; k, v: [tokens, num_kv_heads, kHeadDim]; the rest as in
// context_attention. scale_log2_bits: the float32 as an int, for scalars are int32.
template <typename T, int kHeadDim, int kKeys, bool kHalfAccumulation>
__global__ void __launch_bounds__(kBlockThreads, kHeadDim < 128 ? 3 : 2)
    paged_attention(const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ v, const T*, const T*,
                    const int* __restrict__ query_start, const int* __restrict__ kv_length,
                    const int* __restrict__ page_table, int sequences, int num_kv_heads, int group, int page_shift,
                    int pages_per_sequence, int scale_log2_bits, T* __restrict__ out, T* k_cache, T* v_cache) {
    const int kv_stride = num_kv_heads * kHeadDim;
    const int stride = group * kv_stride;
    context_attention<T, kHeadDim, 1, kKeys, kHalfAccumulation, T>(
        q, k, v, k_cache, v_cache, query_start, kv_length, page_table, out, stride, kv_stride, kv_stride, stride, sequences,
        num_kv_heads, group, page_shift, pages_per_sequence, __int_as_float(scale_log2_bits), 1);
}

}  // namespace trtc

#include "tensorrt_aot/as_functions.cuh"
#include "context_attention/context_attention.cu"

static_assert(trtc::kThreads == trtc::kBlockThreads, "what the launch says");
