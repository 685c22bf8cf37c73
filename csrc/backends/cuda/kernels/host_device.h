// What lets one function be compiled for the device and, in tests and launchers, for the host.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define BAP_HOST_DEVICE __host__ __device__ __forceinline__
// Code of a block: the device's alone under nvcc, since its Block is then the device.
#define BAP_DEVICE __device__ __forceinline__
#define BAP_UNROLL _Pragma("unroll")
#else
#define BAP_HOST_DEVICE inline
#define BAP_DEVICE inline
#define BAP_UNROLL
#endif

namespace bap_kernels {

BAP_HOST_DEVICE constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

}  // namespace bap_kernels
