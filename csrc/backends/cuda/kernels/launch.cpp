// From a math mode, known at run time, to the kernels that were compiled for it.
#include "backends/cuda/kernels/launch.h"

#include <cuda_runtime_api.h>

#include "backends/cuda/kernels/launcher.h"

namespace bap_kernels {

Status launch_gathered_conv2d(const ConvParams& p, MathMode mode, TileShape tile, bool planes, void* stream) {
  switch (mode) {
    case MathMode::kBFloat16:
      return launch_conv_of<MathMode::kBFloat16>(p, tile, planes, stream);
    case MathMode::kHalf:
      return launch_conv_of<MathMode::kHalf>(p, tile, planes, stream);
    default:
      return launch_conv_of<MathMode::kTf32>(p, tile, planes, stream);
  }
}

Status launch_warpgroup_conv2d(const ConvParams& p, MathMode mode, WarpgroupTileShape tile, void* stream) {
  return mode == MathMode::kBFloat16 ? launch_warpgroup_conv_of<MathMode::kBFloat16>(p, tile, stream)
                                     : launch_warpgroup_conv_of<MathMode::kHalf>(p, tile, stream);
}

Status launch_halo_conv2d(const HaloParams& p, MathMode mode, HaloTileShape tile, int shared_bytes, void* stream) {
  switch (mode) {
    case MathMode::kBFloat16:
      return launch_halo_of<MathMode::kBFloat16>(p, tile, shared_bytes, stream);
    case MathMode::kHalf:
      return launch_halo_of<MathMode::kHalf>(p, tile, shared_bytes, stream);
    default:
      return launch_halo_of<MathMode::kTf32>(p, tile, shared_bytes, stream);
  }
}

Status launch_weight_gradient(const WeightGradientParams& p, MathMode mode, TileShape tile, void* stream) {
  switch (mode) {
    case MathMode::kBFloat16:
      return launch_weight_gradient_of<MathMode::kBFloat16>(p, tile, stream);
    case MathMode::kHalf:
      return launch_weight_gradient_of<MathMode::kHalf>(p, tile, stream);
    default:
      return launch_weight_gradient_of<MathMode::kTf32>(p, tile, stream);
  }
}

Status launch_warpgroup_weight_gradient(const WeightGradientParams& p, MathMode mode, void* stream) {
  return mode == MathMode::kBFloat16 ? launch_warpgroup_weight_gradient_of<MathMode::kBFloat16>(p, stream)
                                     : launch_warpgroup_weight_gradient_of<MathMode::kHalf>(p, stream);
}

const char* status_text(Status status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

int sm_count(int device) {
  int count = 0;
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) cudaGetLastError();
  return count > 0 ? count : 1;
}

const CudaLauncher& linked_launcher() {
  static const CudaLauncher table{kLauncherLayout,
                                  /*simulated=*/false,
                                  launch_gathered_conv2d,
                                  launch_warpgroup_conv2d,
                                  launch_halo_conv2d,
                                  launch_weight_gradient,
                                  launch_warpgroup_weight_gradient,
                                  launch_sum_partials,
                                  launch_split_epilogue,
                                  launch_weight_tiles,
                                  launch_channel_pack,
                                  launch_channel_unpack,
                                  status_text,
                                  sm_count,
                                  has_warpgroups};
  return table;
}

}  // namespace bap_kernels
