// Where tokens lie in a paged cache, [num_pages, num_kv_heads, page_size, head_dim]: those of one head together.
#pragma once

namespace trtc {

// The rows of one kv head. Strides are elements.
template <int kHeadDim>
struct HeadRows {
    int page_stride;
    int head_start;  // in a page
    int last_in_page;

    __device__ __forceinline__ HeadRows(int num_kv_heads, int kv_head, int page_shift)
        : page_stride((num_kv_heads << page_shift) * kHeadDim),
          head_start((kv_head << page_shift) * kHeadDim),
          last_in_page((1 << page_shift) - 1) {}

    // The first element of the token at `position` of a sequence, which is on `page`.
    __device__ __forceinline__ long long offset(int page, int position) const {
        return static_cast<long long>(page) * page_stride + (position & last_in_page) * kHeadDim + head_start;
    }
};

}  // namespace trtc
