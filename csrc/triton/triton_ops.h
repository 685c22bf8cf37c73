// The way from a checked call to the Triton kernels, which are Python: private ops that bap_kernels/_dispatch.py
// implements. No call that does not name the backend comes here.
#pragma once

#include "aten/gathered_conv2d_backward.h"
#include "ops/gathered_conv2d_mixed.h"
#include "ops/switched_call.h"

namespace bap_kernels {

// Whether the calling thread named the backend `triton`.
bool triton_named();

// The call must not be trivial, other than that of a mixed batch. They raise NotImplementedError with the reason where
// no kernel covers the call.
at::Tensor triton_gathered_conv2d(const ConvCall& call, const char* op);
GradientTriple triton_gathered_conv2d_backward(const at::Tensor& grad_output, const at::Tensor& input,
                                               const at::Tensor& weight, const OptionalTensor& in_index,
                                               const OptionalTensor& out_index, c10::IntArrayRef stride,
                                               c10::IntArrayRef padding, c10::IntArrayRef dilation, int64_t groups,
                                               std::array<bool, 3> mask);
at::Tensor triton_gathered_conv2d_mixed(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                                        const OptionalTensorList& in_indices, c10::IntArrayRef counts,
                                        c10::IntArrayRef stride, c10::IntArrayRef padding, c10::IntArrayRef dilation,
                                        bool cache_packed, const ConvShape<int64_t>& shape);
at::Tensor triton_switched_conv2d(const SwitchedCall& call);
SwitchedGradients triton_switched_conv2d_backward(const SwitchedCall& call, const at::Tensor& grad_output,
                                                  SwitchedMask mask);

}  // namespace bap_kernels
