// What lets one function be compiled for the device and for the host: the arithmetic that kernels and their launchers
// share.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define BAP_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define BAP_HOST_DEVICE inline
#endif

namespace bap_kernels {

BAP_HOST_DEVICE constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

}  // namespace bap_kernels
