// The way from a checked call to the CUDA C++ kernels: which route a call takes, its packed weight and its lists. The
// kernels are private ops of bap_kernels._C_cuda. No call that does not name the backend comes here.
//
// Routes of the forward and of the input's gradient:
//   planes  1x1 convolutions of planes whose runs of 16 bytes are aligned: any list
//   direct  NHWC with aligned runs of 16 bytes, without a list or with one of aligned blocks of 8, 16 or 32 channels
//   packed  everything else: the listed channels are first copied into a compact NHWC tensor
#pragma once

#include "aten/gathered_conv2d_backward.h"
#include "ops/switched_call.h"

namespace bap_kernels {

// Whether the calling thread named the backend `cuda`.
bool cuda_named();

// The call must not be trivial. They raise NotImplementedError with the reason where no kernel covers the call.
at::Tensor cuda_gathered_conv2d(const ConvCall& call, const char* op);
GradientTriple cuda_gathered_conv2d_backward(const at::Tensor& grad_output, const at::Tensor& input,
                                             const at::Tensor& weight, const OptionalTensor& in_index,
                                             const OptionalTensor& out_index, c10::IntArrayRef stride,
                                             c10::IntArrayRef padding, c10::IntArrayRef dilation, int64_t groups,
                                             std::array<bool, 3> mask);
at::Tensor cuda_switched_conv2d(const SwitchedCall& call);
SwitchedGradients cuda_switched_conv2d_backward(const SwitchedCall& call, const at::Tensor& grad_output,
                                                SwitchedMask mask);

}  // namespace bap_kernels
