// The launch of the kernel of warpgroups on the host, for tests; see launch.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cstdlib>

#include "backends/cuda/kernels/launch.h"
#include "backends/cuda/kernels/warpgroup_conv2d_block.h"
#include "backends/cuda/simulate/simulated_warpgroups.h"

namespace bap_kernels {
namespace {

std::atomic<int64_t> launches{0};

template <class Kernel>
Status simulate(const ConvParams& p) {
  ++launches;
  for (int y = 0; y < Kernel::grid_y(p); ++y) {
    for (int x = 0; x < Kernel::grid_x(p); ++x) {
      SimulatedWarpgroups<typename Kernel::State> block(Kernel::kThreads, Kernel::kSharedBytes, x, y);
      Kernel::run(block, p);
    }
  }
  return 0;
}

}  // namespace

template <Products kProducts>
Status launch_warpgroup_conv_of(const ConvParams& p, WarpgroupTileShape tile, void*) {
#define BAP_KERNELS_CASE(name, ...) \
  case WarpgroupTileShape::k##name: \
    return simulate<WarpgroupConv2d<kProducts, name##WarpgroupTile>>(p);
  switch (tile) { BAP_KERNELS_WARPGROUP_TILES(BAP_KERNELS_CASE) }
#undef BAP_KERNELS_CASE
  return 1;
}

template Status launch_warpgroup_conv_of<Products::kBFloat16>(const ConvParams&, WarpgroupTileShape, void*);
template Status launch_warpgroup_conv_of<Products::kHalf>(const ConvParams&, WarpgroupTileShape, void*);

// As the environment says: not where it says nothing.
bool has_warpgroups(int) {
  const char* wish = std::getenv("BAP_KERNELS_SIMULATED_WARPGROUPS");
  return wish != nullptr && std::atoi(wish) != 0;
}

namespace {
int64_t warpgroup_launches(const torch::stable::Tensor&) { return launches; }
}  // namespace

// How often the kernel has run, which no result tells.
STABLE_TORCH_LIBRARY_FRAGMENT(bap_kernels, m) { m.def("_simulated_warpgroup_launches(Tensor any) -> int"); }
STABLE_TORCH_LIBRARY_IMPL(bap_kernels, CPU, m) {
  m.impl("_simulated_warpgroup_launches", TORCH_BOX(&warpgroup_launches));
}

}  // namespace bap_kernels
