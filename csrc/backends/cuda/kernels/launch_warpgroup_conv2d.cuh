// The launches of the WGMMA kernels in one math mode.
#pragma once

#include "backends/cuda/kernels/launch.cuh"
#include "backends/cuda/kernels/warpgroup_conv2d.cuh"
#include "backends/cuda/kernels/warpgroup_weight_gradient.cuh"

namespace bap_kernels {

template <MathMode kMode, class Tile>
Status launch_warpgroups(const ConvParams& p, void* stream) {
  using Layout = WarpgroupLayout<Tile>;
  const auto kernel =
      p.gradient ? warpgroup_conv2d_kernel<kMode, Tile, true> : warpgroup_conv2d_kernel<kMode, Tile, false>;
  return launch(kernel, with_tiles<Tile>(p), nhwc_grid<Tile>(p, p.parts.count.count()), Layout::kThreads,
                Layout::kSharedBytes, stream);
}
template <MathMode kMode>
Status launch_warpgroup_conv_of(const ConvParams& p, WarpgroupTileShape tile, void* stream) {
  return tile == WarpgroupTileShape::kWide ? launch_warpgroups<kMode, WideWarpgroupTile>(p, stream)
                                           : launch_warpgroups<kMode, SquareWarpgroupTile>(p, stream);
}

template <MathMode kMode>
Status launch_warpgroup_weight_gradient_of(const WeightGradientParams& p, void* stream) {
  using Tile = SquareWarpgroupTile;
  using Layout = WarpgroupLayout<Tile>;
  return launch(warpgroup_weight_gradient_kernel<kMode, Tile>, with_tiles<Tile>(p), weight_gradient_grid<Tile>(p),
                Layout::kThreads, Layout::kSharedBytes, stream);
}

}  // namespace bap_kernels
