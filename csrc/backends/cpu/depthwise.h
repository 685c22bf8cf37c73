// Depthwise convolutions of the native CPU path: where they apply, and their driver.
#pragma once

#include <string>

#include "ops/conv_call.h"

namespace bap_kernels {

// Why there is no kernel for a depthwise call; empty if there is one.
std::string depthwise_unsupported_reason(const ConvCall& call);

// Runs a supported call that is not trivial.
at::Tensor depthwise_gathered_conv2d(const ConvCall& call);

}  // namespace bap_kernels
