// The native CPU path: packed weights, a gather inside the microkernel or inside a cache-sized panel, fused epilogue.
#pragma once

#include <string>

#include "ops/conv_call.h"

namespace bap_kernels {

// Empty if the native kernels can run the call, else the reason why not.
std::string native_why_not(const ConvCall& call);

// Runs the call; native_why_not must be empty and the call not trivial.
at::Tensor native_gathered_conv2d(const ConvCall& call);

}  // namespace bap_kernels
