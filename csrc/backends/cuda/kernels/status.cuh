// What a call of the CUDA runtime returns.
#pragma once

#include <cuda_runtime_api.h>

#include "backends/cuda/kernels/launch.h"

namespace bap_kernels {

// A failure is returned to our caller, and not left behind for the next one who asks for the last error, such as
// PyTorch after a launch of its own.
inline Status cleared(cudaError_t status) {
  if (status != cudaSuccess) cudaGetLastError();
  return status;
}

}  // namespace bap_kernels
