// The switched convolution through PyTorch's own operators: any device, any dtype.
#pragma once

#include "ops/switched_call.h"

namespace bap_kernels {

// All arithmetic is that of the dense convolution, and the switch is not read on the host: no call waits for a GPU.
at::Tensor masked_switched_conv2d(const SwitchedCall& call);

// Only what the lists name is computed, where they are given; else as above. Calls may be trivial.
SwitchedGradients aten_switched_conv2d_backward(const SwitchedBackwardCall& call);

}  // namespace bap_kernels
