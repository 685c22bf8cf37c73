// The convolution by WGMMA in one math mode; see warpgroup_conv2d.cuh.
#include "backends/cuda/kernels/launch_warpgroup_conv2d.cuh"

namespace bap_kernels {

template Status launch_warpgroup_conv_of<MathMode::kHalf>(const ConvParams&, WarpgroupTileShape, void*);

}  // namespace bap_kernels
