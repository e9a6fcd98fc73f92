// After this, kernels of an included .cu file are functions, for a kernel of TensorRT's calling convention to call: one
// source for both, and the file stays as the CUDA target compiles it. Nothing may be included or declared after the file but
// what such a file may hold itself; headers that it includes must have been included before.
#pragma once
#undef __global__
#undef __launch_bounds__
#define __global__ __device__ __forceinline__
#define __launch_bounds__(...)
