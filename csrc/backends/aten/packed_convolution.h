// oneDNN's convolution of a weight that was reordered for it once; at::convolution reorders it in every call.
#pragma once

#include <c10/util/FunctionRef.h>

#include "ops/conv_call.h"

namespace bap_kernels {

// Whether the call's weight can be kept reordered, and oneDNN convolves its dtype on this machine.
bool packed_convolution_applies(const ConvCall& call);

// The convolution of `x`, the listed channels of the call's input, with even `padding` (rows, columns). `slice` makes
// the listed slices of the weight, when they are not kept. The result is channels_last, whatever `x` is.
at::Tensor packed_convolution(const ConvCall& call, const at::Tensor& x, c10::IntArrayRef padding,
                              const at::Tensor& bias, c10::function_ref<at::Tensor()> slice);

}  // namespace bap_kernels
