// The launches of the CUDA kernels on the host, for tests: every block, one after the other. Built by
// tools/build_simulation.py only, with g++ and without CUDA.
#include "backends/cuda/kernels/launch.h"

#include "backends/cuda/kernels/channel_pack_block.h"
#include "backends/cuda/kernels/channel_unpack_block.h"
#include "backends/cuda/kernels/gathered_conv2d_block.h"
#include "backends/cuda/kernels/halo_conv2d_block.h"
#include "backends/cuda/kernels/weight_gradient_block.h"
#include "backends/cuda/simulate/device.h"
#include "backends/cuda/simulate/simulated_block.h"

namespace bap_kernels {
namespace {

template <class Kernel, class Params>
Status simulate(const char* name, const Params& p, int shared_bytes) {
  simulated_device().launches.emplace_back(name);
  for (int y = 0; y < Kernel::grid_y(p); ++y) {
    for (int x = 0; x < Kernel::grid_x(p); ++x) {
      SimulatedBlock<typename Kernel::State> block(Kernel::kThreads, shared_bytes, x, y);
      Kernel::run(block, p);
    }
  }
  return 0;
}

}  // namespace

template <MathMode kMode>
Status launch_conv_of(const ConvParams& p, TileShape tile, bool planes, void*) {
#define BAP_KERNELS_CASE(name, ...) \
  case TileShape::k##name:          \
    return simulate<GatheredConv2d<kMode, name##Tile, kPlanes>>("gathered_conv2d", p, name##Tile::kSharedBytes);
  if (planes) {
    constexpr bool kPlanes = true;
    switch (tile) {
      BAP_KERNELS_PLANES_TILES(BAP_KERNELS_CASE)
      default:
        return 1;
    }
  }
  constexpr bool kPlanes = false;
  switch (tile) { BAP_KERNELS_TILES(BAP_KERNELS_CASE) }
#undef BAP_KERNELS_CASE
  return 1;
}

template <MathMode kMode>
Status launch_halo_of(const HaloParams& p, HaloTileShape tile, int shared_bytes, void*) {
#define BAP_KERNELS_CASE(name, ...) \
  case HaloTileShape::k##name:      \
    return simulate<HaloConv2d<kMode, name##HaloTile>>("halo_conv2d", p, shared_bytes);
  switch (tile) { BAP_KERNELS_HALO_TILES(BAP_KERNELS_CASE) }
#undef BAP_KERNELS_CASE
  return 1;
}

template <MathMode kMode>
Status launch_weight_gradient_of(const WeightGradientParams& p, TileShape tile, void*) {
#define BAP_KERNELS_CASE(name, ...) \
  case TileShape::k##name:          \
    return simulate<WeightGradient<kMode, name##Tile>>("weight_gradient", p, name##Tile::kPipelineBytes);
  switch (tile) {
    BAP_KERNELS_WEIGHT_TILES(BAP_KERNELS_CASE)
    default:
      return 1;
  }
#undef BAP_KERNELS_CASE
}

#define BAP_KERNELS_INSTANCE(name)                                                                 \
  template Status launch_conv_of<MathMode::k##name>(const ConvParams&, TileShape, bool, void*);    \
  template Status launch_halo_of<MathMode::k##name>(const HaloParams&, HaloTileShape, int, void*); \
  template Status launch_weight_gradient_of<MathMode::k##name>(const WeightGradientParams&, TileShape, void*);
BAP_KERNELS_MATH_MODES(BAP_KERNELS_INSTANCE)
#undef BAP_KERNELS_INSTANCE

Status launch_channel_pack(const ChannelPackParams& p, MathMode mode, void*) {
  switch (mode) {
    case MathMode::kBFloat16:
      return simulate<ChannelPack<BFloat16Word>>("channel_pack", p, ChannelPack<BFloat16Word>::kSharedBytes);
    case MathMode::kHalf:
      return simulate<ChannelPack<HalfWord>>("channel_pack", p, ChannelPack<HalfWord>::kSharedBytes);
    default:
      return simulate<ChannelPack<float>>("channel_pack", p, ChannelPack<float>::kSharedBytes);
  }
}

Status launch_channel_unpack(const ChannelUnpackParams& p, MathMode mode, void*) {
  switch (mode) {
    case MathMode::kBFloat16:
      return simulate<ChannelUnpack<BFloat16Word>>("channel_unpack", p, ChannelUnpack<BFloat16Word>::kSharedBytes);
    case MathMode::kHalf:
      return simulate<ChannelUnpack<HalfWord>>("channel_unpack", p, ChannelUnpack<HalfWord>::kSharedBytes);
    default:
      return simulate<ChannelUnpack<float>>("channel_unpack", p, ChannelUnpack<float>::kSharedBytes);
  }
}

Status launch_sum_partials(const SumPartialsParams& p, MathMode mode, void*) {
  switch (mode) {
    case MathMode::kBFloat16:
      return simulate<SumPartials<BFloat16Word>>("sum_partials", p, 0);
    case MathMode::kHalf:
      return simulate<SumPartials<HalfWord>>("sum_partials", p, 0);
    default:
      return simulate<SumPartials<float>>("sum_partials", p, 0);
  }
}

const char* status_text(Status status) { return status == 0 ? "success" : "no such instance"; }

int sm_count(int) { return simulated_device().sm_count; }

}  // namespace bap_kernels
