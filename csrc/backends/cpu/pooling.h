// Pooling of the tensors of a plan: the driver and the kernels of depthwise convolutions, without weights.
// PyTorch's max pooling finds the place of each maximum, too, which inference does not need.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>

namespace bap_kernels {

// at::max_pool2d and at::avg_pool2d of (N, C, H, W), the latter without padding; float32 and bfloat16 tensors on the
// CPU by our kernels, others by PyTorch's. Pairs are (height, width).
at::Tensor max_pool2d(const at::Tensor& x, std::array<int64_t, 2> kernel, std::array<int64_t, 2> stride,
                      std::array<int64_t, 2> padding, std::array<int64_t, 2> dilation, bool ceil_mode);
at::Tensor avg_pool2d(const at::Tensor& x, std::array<int64_t, 2> kernel, std::array<int64_t, 2> stride);

// at::adaptive_avg_pool2d of (N, C, H, W) to one pixel. Of planes PyTorch's is the faster one.
at::Tensor global_avg_pool2d(const at::Tensor& x);

}  // namespace bap_kernels
