// The kernels: one entry function for every block of *_block.h, and the launches of each math mode.
#pragma once

#include "backends/cuda/kernels/device_block.cuh"
#include "backends/cuda/kernels/gathered_conv2d_block.h"
#include "backends/cuda/kernels/halo_conv2d_block.h"
#include "backends/cuda/kernels/launch.h"
#include "backends/cuda/kernels/status.cuh"
#include "backends/cuda/kernels/weight_gradient_block.h"

namespace bap_kernels {

template <class Kernel, class Params, int kBlocks>
__global__ void __launch_bounds__(Kernel::kThreads, kBlocks) block_kernel(const __grid_constant__ Params p) {
  DeviceBlock<typename Kernel::State> block;
  Kernel::run(block, p);
}

template <class Kernel, int kBlocks, class Params>
Status launch_blocks(const Params& p, int shared_bytes, void* stream) {
  const auto kernel = block_kernel<Kernel, Params, kBlocks>;
  // The attribute belongs to the current device; setting it again costs less than keeping count of devices.
  if (shared_bytes > 48 * 1024) {
    const Status status =
        cleared(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
    if (status != cudaSuccess) return status;
  }
  const dim3 grid(static_cast<unsigned>(Kernel::grid_x(p)), static_cast<unsigned>(Kernel::grid_y(p)));
  kernel<<<grid, Kernel::kThreads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(p);
  return cudaGetLastError();
}

template <MathMode kMode>
Status launch_conv_of(const ConvParams& p, TileShape tile, bool planes, void* stream) {
#define BAP_KERNELS_CASE(name, ...)                                                                                    \
  case TileShape::k##name:                                                                                             \
    return launch_blocks<GatheredConv2d<kMode, name##Tile, kPlanes>, name##Tile::kBlocks>(p, name##Tile::kSharedBytes, \
                                                                                          stream);
  if (planes) {
    constexpr bool kPlanes = true;
    switch (tile) {
      BAP_KERNELS_PLANES_TILES(BAP_KERNELS_CASE)
      default:
        return cudaErrorInvalidValue;
    }
  }
  constexpr bool kPlanes = false;
  switch (tile) { BAP_KERNELS_TILES(BAP_KERNELS_CASE) }
#undef BAP_KERNELS_CASE
  return cudaErrorInvalidValue;
}

template <MathMode kMode>
Status launch_halo_of(const HaloParams& p, HaloTileShape tile, int shared_bytes, void* stream) {
#define BAP_KERNELS_CASE(name, ...) \
  case HaloTileShape::k##name:      \
    return launch_blocks<HaloConv2d<kMode, name##HaloTile>, name##HaloTile::kBlocks>(p, shared_bytes, stream);
  switch (tile) { BAP_KERNELS_HALO_TILES(BAP_KERNELS_CASE) }
#undef BAP_KERNELS_CASE
  return cudaErrorInvalidValue;
}

template <MathMode kMode>
Status launch_weight_gradient_of(const WeightGradientParams& p, TileShape tile, void* stream) {
#define BAP_KERNELS_CASE(name, ...) \
  case TileShape::k##name:          \
    return launch_blocks<WeightGradient<kMode, name##Tile>, name##Tile::kBlocks>(p, name##Tile::kPipelineBytes, stream);
  switch (tile) {
    BAP_KERNELS_WEIGHT_TILES(BAP_KERNELS_CASE)
    default:
      return cudaErrorInvalidValue;
  }
#undef BAP_KERNELS_CASE
}

}  // namespace bap_kernels
