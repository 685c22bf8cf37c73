// The switched convolution through PyTorch's own operators: any device, any dtype.
#pragma once

#include "ops/switched_call.h"

namespace bap_kernels {

// All arithmetic is that of the dense convolution, and the switch is not read on the host: no call waits for a GPU.
at::Tensor masked_switched_conv2d(const SwitchedCall& call);
SwitchedGradients masked_switched_conv2d_backward(const SwitchedCall& call, const at::Tensor& grad_output,
                                                  SwitchedMask mask);

// Only what the lists name is computed. `compact` is the result of call.on(lists.on).
at::Tensor widened_result(const SwitchedCall& call, const SwitchLists& lists, const at::Tensor& compact);
SwitchedGradients listed_switched_conv2d_backward(const SwitchedCall& call, const SwitchLists& lists,
                                                  const at::Tensor& grad_output, SwitchedMask mask);

}  // namespace bap_kernels
