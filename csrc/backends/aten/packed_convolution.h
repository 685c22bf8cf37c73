// oneDNN's convolution of a weight that was reordered for it once; at::convolution reorders it in every call.
#pragma once

#include "backends/aten/convolution.h"
#include "ops/conv_call.h"

namespace bap_kernels {

// Whether the call's weight can be kept reordered, and oneDNN convolves its dtype on this machine.
bool packed_convolution_applies(const ConvCall& call);

// Tells orders of one weight apart, for PackedCache: those for inputs of `size` with even `padding` (rows, columns).
int reordered_variant(const ConvCall& call, c10::IntArrayRef size, c10::IntArrayRef padding);

}  // namespace bap_kernels
