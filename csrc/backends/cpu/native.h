// The native CPU path: packed weights, a gather inside the microkernel or inside a cache-sized panel, fused epilogue.
#pragma once

#include <string>

#include "ops/mixed_call.h"
#include "ops/switched_call.h"

namespace bap_kernels {

// Why the native kernels cannot run the call; empty if they can.
std::string native_unsupported_reason(const ConvCall& call);

// Runs the call, which must be supported and not trivial, as a direct convolution.
at::Tensor native_gathered_conv2d(const ConvCall& call);

// Likewise; under `auto`, which measures other calls, maybe by Winograd.
at::Tensor native_unmeasured_gathered_conv2d(const ConvCall& call);

// The runs of a mixed batch as one pool of tasks; each must be supported as a
// call of its own, and not trivial.
void native_gathered_conv2d_mixed(const MixedCall& call, const char* op);

// Why the native kernels cannot run a backward; empty if they can.
std::string native_backward_unsupported_reason(const at::Tensor& input, const ConvShape<int64_t>& shape);

// Calls must be supported, and may be trivial.
GradientTriple native_gathered_conv2d_backward(const ConvBackwardCall& call);
SwitchedGradients native_switched_conv2d_backward(const SwitchedBackwardCall& call);

}  // namespace bap_kernels
