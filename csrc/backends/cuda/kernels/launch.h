// Launches of the kernels on a stream of the current device. No CUDA type appears here: the host's code is compiled
// without CUDA. A status is a cudaError_t, 0 for success.
#pragma once

#include "backends/cuda/kernels/conv_params.h"
#include "backends/cuda/kernels/halo_shape.h"
#include "backends/cuda/kernels/instances.h"

namespace bap_kernels {

using Status = int;

// `planes`: by the kernel of planar sources.
Status launch_gathered_conv2d(const ConvParams& params, MathMode mode, TileShape tile, bool planes, void* stream);
// Products of the 16-bit kinds, by sources that are not planar and without terms of a switch's gradient; on devices
// that have warpgroups.
Status launch_warpgroup_conv2d(const ConvParams& params, MathMode mode, WarpgroupTileShape tile, void* stream);
// `shared_bytes`: what the choice of the shape said.
Status launch_halo_conv2d(const HaloParams& params, MathMode mode, HaloTileShape tile, int shared_bytes, void* stream);
Status launch_weight_gradient(const WeightGradientParams& params, MathMode mode, TileShape tile, void* stream);
// By WGMMA, with its square tile: 16-bit kinds, on devices that have warpgroups.
Status launch_warpgroup_weight_gradient(const WeightGradientParams& params, MathMode mode, void* stream);
Status launch_sum_partials(const SumPartialsParams& params, MathMode mode, void* stream);
// Adds the parts of a convolution's sums, of the launch before, and stores its result.
Status launch_split_epilogue(const ConvParams& params, MathMode mode, void* stream);
Status launch_weight_tiles(const WeightTilesParams& params, void* stream);
Status launch_channel_pack(const ChannelPackParams& params, MathMode mode, void* stream);
Status launch_channel_unpack(const ChannelUnpackParams& params, MathMode mode, void* stream);

const char* status_text(Status status);
// Streaming multiprocessors of a device.
int sm_count(int device);
// Whether a device, the current one, runs WGMMA, and code for it was compiled.
bool has_warpgroups(int device);

// One math mode's part of the first five: what the files of each compile.
template <MathMode kMode>
Status launch_conv_of(const ConvParams& params, TileShape tile, bool planes, void* stream);
template <MathMode kMode>
Status launch_warpgroup_conv_of(const ConvParams& params, WarpgroupTileShape tile, void* stream);
template <MathMode kMode>
Status launch_halo_of(const HaloParams& params, HaloTileShape tile, int shared_bytes, void* stream);
template <MathMode kMode>
Status launch_weight_gradient_of(const WeightGradientParams& params, TileShape tile, void* stream);
template <MathMode kMode>
Status launch_warpgroup_weight_gradient_of(const WeightGradientParams& params, void* stream);

}  // namespace bap_kernels
