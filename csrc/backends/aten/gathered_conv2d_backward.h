// Backward of the gathered convolution through PyTorch's convolution_backward, on any device.
#pragma once

#include "ops/gathered_conv2d.h"

namespace bap_kernels {

// Gradients of input, weight and bias, full size; an empty tensor for each that `mask` leaves out. Arguments were
// checked.
GradientTriple aten_gathered_conv2d_backward(const at::Tensor& grad_output, const at::Tensor& input,
                                             const at::Tensor& weight, const OptionalTensor& in_index,
                                             const OptionalTensor& out_index, c10::IntArrayRef stride,
                                             c10::IntArrayRef padding, c10::IntArrayRef dilation,
                                             const ConvShape<int64_t>& shape, std::array<bool, 3> mask);

// Gradient of the bias: the sum of grad_output over images and pixels at the listed filters, zeros elsewhere.
at::Tensor listed_bias_gradient(const at::Tensor& grad_output, const OptionalTensor& out_index,
                                const ConvShape<int64_t>& shape);

}  // namespace bap_kernels
