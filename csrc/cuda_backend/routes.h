// What forward, backward and the switched convolution share: a launch of the implicit GEMM on the route that suits.
#pragma once

#include "cuda_backend/launches.h"

namespace bap_kernels {

// Fills in the launch's source, packed first where the kernels cannot read it, and launches it.
void run_conv_route(ConvLaunch& launch, const at::Tensor& source, const ListForm& list, const OptionalTensor& used = {},
                    const Fusion& prologue = {});

// The forward: also fills in the geometry. `used`: how many channels of the list are read, on the device; absent: all.
void run_forward(ConvLaunch& launch, const at::Tensor& input, const at::Tensor& weight, const ListForm& list,
                 int64_t out_h, int64_t out_w, c10::IntArrayRef stride, c10::IntArrayRef padding,
                 c10::IntArrayRef dilation, const OptionalTensor& used, const Fusion& prologue);

// `t`, or a compact NHWC copy of it, whose channels can be copied in runs of 16 bytes.
at::Tensor with_aligned_chunks(const at::Tensor& t);

// The weight's gradient into `result`; `used`: how many channels of `columns` are read and stored, on the device.
void run_weight_gradient(const at::Tensor& result, const at::Tensor& grad, const at::Tensor& input,
                         const ListForm& rows, const ListForm& columns, const OptionalTensor& used,
                         const std::array<AxisOptions, 2>& axes);

}  // namespace bap_kernels
