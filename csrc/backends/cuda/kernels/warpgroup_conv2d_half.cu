// The kernels by WGMMA in one math mode; see warpgroup_conv2d.cuh and warpgroup_weight_gradient.cuh.
#include "backends/cuda/kernels/launch_warpgroup_conv2d.cuh"

namespace bap_kernels {

template Status launch_warpgroup_conv_of<MathMode::kHalf>(const ConvParams&, WarpgroupTileShape, void*);
template Status launch_warpgroup_weight_gradient_of<MathMode::kHalf>(const WeightGradientParams&, void*);

}  // namespace bap_kernels
