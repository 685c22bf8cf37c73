// The entry function of the WGMMA kernel and its launch, in one math mode.
#pragma once

#include <atomic>

#include "backends/cuda/kernels/device_warpgroups.cuh"
#include "backends/cuda/kernels/launch.h"
#include "backends/cuda/kernels/status.cuh"
#include "backends/cuda/kernels/warpgroup_conv2d_block.h"

namespace bap_kernels {

// Code for other devices has no body and takes no block of this size, by which it is known; see has_warpgroups.
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define BAP_KERNELS_WARPGROUP_BOUND(threads) 32
#else
#define BAP_KERNELS_WARPGROUP_BOUND(threads) threads
#endif

template <class Kernel>
__global__ void __launch_bounds__(BAP_KERNELS_WARPGROUP_BOUND(Kernel::kThreads), 1)
    warpgroup_kernel(const __grid_constant__ ConvParams p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  DeviceWarpgroups<typename Kernel::State> block;
  Kernel::run(block, p);
#endif
}

template <class Kernel>
Status launch_warpgroups(const ConvParams& p, void* stream) {
  const auto kernel = warpgroup_kernel<Kernel>;
  const Status status =
      cleared(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Kernel::kSharedBytes));
  if (status != cudaSuccess) return status;
  const dim3 grid(static_cast<unsigned>(Kernel::grid_x(p)), static_cast<unsigned>(Kernel::grid_y(p)));
  kernel<<<grid, Kernel::kThreads, Kernel::kSharedBytes, static_cast<cudaStream_t>(stream)>>>(p);
  return cudaGetLastError();
}

template <MathMode kMode>
Status launch_warpgroup_conv_of(const ConvParams& p, WarpgroupTileShape tile, void* stream) {
#define BAP_KERNELS_CASE(name, ...) \
  case WarpgroupTileShape::k##name: \
    return launch_warpgroups<WarpgroupConv2d<kMode, name##WarpgroupTile>>(p, stream);
  switch (tile) { BAP_KERNELS_WARPGROUP_TILES(BAP_KERNELS_CASE) }
#undef BAP_KERNELS_CASE
  return cudaErrorInvalidValue;
}

}  // namespace bap_kernels
