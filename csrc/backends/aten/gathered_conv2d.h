// The gathered convolution through PyTorch's own operators: any device, any dtype, and the baseline.
#pragma once

#include "dispatch/candidate.h"
#include "ops/conv_call.h"

namespace bap_kernels {

// `conv` and everything fused around it. kDense and kMasked must not be asked for when `dense_applies` is false, nor
// kGatherPacked when `packed_convolution_applies` is. `device` is that of the tensors, except in tests.
at::Tensor aten_gathered_conv2d(const ConvCall& call, Candidate candidate, c10::DeviceType device);
inline at::Tensor aten_gathered_conv2d(const ConvCall& call, Candidate candidate) {
  return aten_gathered_conv2d(call, candidate, call.input.device().type());
}

// Leaving the input whole can cost less than gathering: groups == 1 and an in-list.
bool dense_applies(const ConvCall& call);

// Through PyTorch's convolution_backward. Calls may be trivial.
GradientTriple aten_gathered_conv2d_backward(const ConvBackwardCall& call);

}  // namespace bap_kernels
