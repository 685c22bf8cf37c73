// A kernel's launch, with the status for our caller.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include "backends/cuda/kernels/launch.h"

namespace bap_kernels {

// A failure is returned to our caller, and not left behind for the next one who asks for the last error, such as
// PyTorch after a launch of its own.
inline Status cleared(cudaError_t status) {
  if (status != cudaSuccess) cudaGetLastError();
  return status;
}

template <class Params>
Status launch(void (*kernel)(Params), const Params& p, dim3 grid, int threads, int shared_bytes, void* stream) {
  // The attribute belongs to the current device; setting it again costs less than keeping count of devices.
  if (shared_bytes > 48 * 1024) {
    const Status status =
        cleared(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
    if (status != cudaSuccess) return status;
  }
  kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(p);
  return cudaGetLastError();
}

// What `run` returns for the element type of a math mode; it is called with a value of that type.
template <class Run>
Status with_element(MathMode mode, Run run) {
  switch (mode) {
    case MathMode::kBFloat16:
      return run(__nv_bfloat16{});
    case MathMode::kHalf:
      return run(__half{});
    default:
      return run(float{});
  }
}

}  // namespace bap_kernels
