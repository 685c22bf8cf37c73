// The launch of the kernel of warpgroups on the host, for tests; see launch.cpp.
#include "backends/cuda/kernels/launch.h"
#include "backends/cuda/kernels/warpgroup_conv2d_block.h"
#include "backends/cuda/simulate/device.h"
#include "backends/cuda/simulate/simulated_warpgroups.h"

namespace bap_kernels {
namespace {

template <class Kernel>
Status simulate(const ConvParams& p) {
  simulated_device().launches.emplace_back("warpgroup_conv2d");
  for (int y = 0; y < Kernel::grid_y(p); ++y) {
    for (int x = 0; x < Kernel::grid_x(p); ++x) {
      SimulatedWarpgroups<typename Kernel::State> block(Kernel::kThreads, Kernel::kSharedBytes, x, y);
      Kernel::run(block, p);
    }
  }
  return 0;
}

}  // namespace

template <MathMode kMode>
Status launch_warpgroup_conv_of(const ConvParams& p, WarpgroupTileShape tile, void*) {
#define BAP_KERNELS_CASE(name, ...) \
  case WarpgroupTileShape::k##name: \
    return simulate<WarpgroupConv2d<kMode, name##WarpgroupTile>>(p);
  switch (tile) { BAP_KERNELS_WARPGROUP_TILES(BAP_KERNELS_CASE) }
#undef BAP_KERNELS_CASE
  return 1;
}

template Status launch_warpgroup_conv_of<MathMode::kBFloat16>(const ConvParams&, WarpgroupTileShape, void*);
template Status launch_warpgroup_conv_of<MathMode::kHalf>(const ConvParams&, WarpgroupTileShape, void*);

bool has_warpgroups(int) { return simulated_device().warpgroups; }

}  // namespace bap_kernels
