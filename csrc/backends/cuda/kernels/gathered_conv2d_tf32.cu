// The convolution kernels of one math mode; see gathered_conv2d_block.h, halo_conv2d_block.h and
// weight_gradient_block.h.
#include "backends/cuda/kernels/launch.cuh"

namespace bap_kernels {

template Status launch_conv_of<MathMode::kTf32>(const ConvParams&, TileShape, bool, void*);
template Status launch_halo_of<MathMode::kTf32>(const HaloParams&, HaloTileShape, int, void*);
template Status launch_weight_gradient_of<MathMode::kTf32>(const WeightGradientParams&, TileShape, void*);

}  // namespace bap_kernels
