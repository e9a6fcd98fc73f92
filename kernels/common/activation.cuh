// Element-wise activations, selected at run time; the numbers are `ACTIVATIONS` in kernels/linear/__init__.py.
#pragma once

namespace trtc {

constexpr int kActivationNone = 0;
constexpr int kActivationRelu = 1;
constexpr int kActivationGelu = 2;
constexpr int kActivationGeluTanh = 3;
constexpr int kActivationSilu = 4;

__device__ __forceinline__ float activate(float x, int kind) {
    switch (kind) {
        case kActivationRelu:
            // Not fmaxf: a NaN must stay a NaN.
            return x < 0.f ? 0.f : x;
        case kActivationGelu:
            return 0.5f * x * (1.f + erff(x * 0.70710678118654752f));
        case kActivationGeluTanh:
            return 0.5f * x * (1.f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
        case kActivationSilu:
            return x / (1.f + __expf(-x));
        default:
            return x;
    }
}

}  // namespace trtc
