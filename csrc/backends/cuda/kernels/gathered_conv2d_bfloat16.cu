// The kernels of one math mode that multiply by mma.sync, so that the modes compile side by side.
#include "backends/cuda/kernels/launch_conv2d.cuh"

namespace bap_kernels {

template Status launch_conv_of<MathMode::kBFloat16>(const ConvParams&, TileShape, bool, void*);
template Status launch_halo_of<MathMode::kBFloat16>(const HaloParams&, HaloTileShape, int, void*);
template Status launch_weight_gradient_of<MathMode::kBFloat16>(const WeightGradientParams&, TileShape, void*);

}  // namespace bap_kernels
