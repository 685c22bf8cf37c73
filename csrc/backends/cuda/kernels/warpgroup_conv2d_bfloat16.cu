// The kernels by WGMMA in one math mode, and whether a device runs them; see warpgroup_conv2d.cuh and
// warpgroup_weight_gradient.cuh.
#include <atomic>

#include "backends/cuda/kernels/launch_warpgroup_conv2d.cuh"

namespace bap_kernels {

template Status launch_warpgroup_conv_of<MathMode::kBFloat16>(const ConvParams&, WarpgroupTileShape, void*);
template Status launch_warpgroup_weight_gradient_of<MathMode::kBFloat16>(const WeightGradientParams&, void*);

bool has_warpgroups(int device) {
  constexpr int kDevices = 64;
  static std::atomic<signed char> known[kDevices];  // 0: not asked yet
  if (device < 0 || device >= kDevices) return false;
  if (known[device] == 0) {
    const auto kernel = warpgroup_conv2d_kernel<MathMode::kBFloat16, SquareWarpgroupTile, false>;
    int major = 0;
    cudaFuncAttributes attributes{};
    const bool runs =
        cleared(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)) == cudaSuccess &&
        major == 9 && cleared(cudaFuncGetAttributes(&attributes, kernel)) == cudaSuccess &&
        attributes.maxThreadsPerBlock >= WarpgroupLayout<SquareWarpgroupTile>::kThreads;
    known[device] = runs ? 1 : -1;
  }
  return known[device] > 0;
}

}  // namespace bap_kernels
