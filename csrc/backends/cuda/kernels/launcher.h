// The library bap_kernels._C_cuda as a table of its launches. Python's loader hands it from one
// library to the other in a capsule, so that neither links with the other and no argument changes its form between.
#pragma once

#include <cstddef>

#include "backends/cuda/kernels/launch.h"

namespace bap_kernels {

// The capsule's name, by which the receiving side knows what it was given.
constexpr const char* kLauncherCapsule = "bap_kernels.CudaLauncher";

struct CudaLauncher {
  uint64_t layout;  // kLauncherLayout of the side that made it
  bool simulated;   // computes on CPU tensors, as tests let it
  decltype(&launch_gathered_conv2d) gathered_conv2d;
  decltype(&launch_warpgroup_conv2d) warpgroup_conv2d;
  decltype(&launch_halo_conv2d) halo_conv2d;
  decltype(&launch_weight_gradient) weight_gradient;
  decltype(&launch_warpgroup_weight_gradient) warpgroup_weight_gradient;
  decltype(&launch_sum_partials) sum_partials;
  decltype(&launch_split_epilogue) split_epilogue;
  decltype(&launch_weight_tiles) weight_tiles;
  decltype(&launch_channel_pack) channel_pack;
  decltype(&launch_channel_unpack) channel_unpack;
  decltype(&bap_kernels::status_text) status_text;
  decltype(&bap_kernels::sm_count) sm_count;
  decltype(&bap_kernels::has_warpgroups) has_warpgroups;
};

// Libraries that were built from other sources pass structs of other sizes, with few exceptions.
constexpr uint64_t kLauncherLayout = [] {
  uint64_t layout = 0;
  for (const size_t size :
       {sizeof(CudaLauncher), sizeof(ConvParams), sizeof(HaloParams), sizeof(WeightGradientParams),
        sizeof(SumPartialsParams), sizeof(WeightTilesParams), sizeof(ChannelPackParams), sizeof(ChannelUnpackParams)}) {
    layout = layout * 4093 + static_cast<uint64_t>(size);
  }
  return layout;
}();

// The table of the library in which it is linked.
const CudaLauncher& linked_launcher();

}  // namespace bap_kernels
