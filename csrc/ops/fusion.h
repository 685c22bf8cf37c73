// What is fused around a convolution, by PyTorch's own operators; and results that need no convolution.
#pragma once

#include "ops/conv_call.h"

namespace bap_kernels {

// `fresh`: nothing else sees x, which may be overwritten.
at::Tensor apply_prologue(at::Tensor x, const Fusion& fusion, bool fresh);
// Into y, which nothing else may see; in the call's memory format.
at::Tensor apply_epilogue(at::Tensor y, const ConvCall& call);

// The bias at the listed outputs, or an undefined tensor.
at::Tensor listed_bias(const ConvCall& call);

// Empty results, and convolutions over no channel at all: the bias and what is fused.
at::Tensor trivial_result(const ConvCall& call);

}  // namespace bap_kernels
