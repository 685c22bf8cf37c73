// The convolution by products of warpgroups, of one kind of products; see warpgroup_conv2d_block.h.
#include "backends/cuda/kernels/launch_warpgroups.cuh"

namespace bap_kernels {

template Status launch_warpgroup_conv_of<Products::kHalf>(const ConvParams&, WarpgroupTileShape, void*);

}  // namespace bap_kernels
