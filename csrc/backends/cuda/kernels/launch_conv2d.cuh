// The launches of the convolution kernels in one math mode: from a tile, known at run time, to the instance.
#pragma once

#include "backends/cuda/kernels/gathered_conv2d.cuh"
#include "backends/cuda/kernels/halo_conv2d.cuh"
#include "backends/cuda/kernels/launch.cuh"
#include "backends/cuda/kernels/planar_conv2d.cuh"
#include "backends/cuda/kernels/weight_gradient.cuh"

namespace bap_kernels {

template <MathMode kMode, class Tile>
Status launch_nhwc(const ConvParams& p, void* stream) {
  const auto kernel =
      p.gradient ? gathered_conv2d_kernel<kMode, Tile, true> : gathered_conv2d_kernel<kMode, Tile, false>;
  return launch(kernel, with_tiles<Tile>(p), nhwc_grid<Tile>(p, p.parts.count.count()), Tile::kThreads,
                Tile::kSharedBytes, stream);
}
template <MathMode kMode, class Tile>
Status launch_planar(const ConvParams& p, void* stream) {
  return launch(planar_conv2d_kernel<kMode, Tile>, with_tiles<Tile>(p), planar_grid<Tile>(p), Tile::kThreads,
                Tile::kSharedBytes, stream);
}
template <MathMode kMode>
Status launch_conv_of(const ConvParams& p, TileShape tile, bool planes, void* stream) {
  switch (tile) {
    case TileShape::kLarge:
      return planes ? launch_planar<kMode, LargeTile>(p, stream) : launch_nhwc<kMode, LargeTile>(p, stream);
    case TileShape::kSmall:
      return planes ? launch_planar<kMode, SmallTile>(p, stream) : launch_nhwc<kMode, SmallTile>(p, stream);
    case TileShape::kThin:
      return planes ? cudaErrorInvalidValue : launch_nhwc<kMode, ThinTile>(p, stream);
  }
  return cudaErrorInvalidValue;
}

template <MathMode kMode, class Tile>
Status launch_halo(const HaloParams& p, int shared_bytes, void* stream) {
  return launch(halo_conv2d_kernel<kMode, Tile>, with_tiles<Tile>(p), halo_grid<Tile>(p), Tile::kThreads, shared_bytes,
                stream);
}
template <MathMode kMode>
Status launch_halo_of(const HaloParams& p, HaloTileShape tile, int shared_bytes, void* stream) {
  return tile == HaloTileShape::kLarge ? launch_halo<kMode, LargeHaloTile>(p, shared_bytes, stream)
                                       : launch_halo<kMode, SmallHaloTile>(p, shared_bytes, stream);
}

template <MathMode kMode, class Tile>
Status launch_weight(const WeightGradientParams& p, void* stream) {
  return launch(weight_gradient_kernel<kMode, Tile>, with_tiles<Tile>(p), weight_gradient_grid<Tile>(p), Tile::kThreads,
                Tile::kPipelineBytes, stream);
}
template <MathMode kMode>
Status launch_weight_gradient_of(const WeightGradientParams& p, TileShape tile, void* stream) {
  switch (tile) {
    case TileShape::kLarge:
      return launch_weight<kMode, LargeTile>(p, stream);
    case TileShape::kSmall:
      return launch_weight<kMode, SmallTile>(p, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace bap_kernels
