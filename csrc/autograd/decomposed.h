// The ops as compositions of PyTorch's differentiable operators, for every derivative but the first in reverse mode:
// forward-mode AD, second derivatives, and the transforms of torch.func (grad, vjp, jvp, jacrev, jacfwd, hessian,
// vmap). What no list names is never read, so that its NaN reaches neither results nor derivatives.
#pragma once

#include "ops/gathered_conv2d_mixed.h"
#include "ops/switched_conv2d.h"

namespace bap_kernels {

// Whether a transform of torch.func is at work on this thread, or one of the tensors has a forward-mode tangent;
// null stands for an absent one.
bool needs_decomposition(std::initializer_list<const at::Tensor*> tensors);

// Raises NotImplementedError, with the op's name, in these cases.
void refuse_decomposition(const char* op, std::initializer_list<const at::Tensor*> tensors);

at::Tensor decomposed_gathered_conv2d(const GatheredConv2dArgs<c10::SymInt>& args);
GradientTriple decomposed_gathered_conv2d_backward(const GatheredConv2dBackwardArgs<c10::SymInt>& args);
at::Tensor decomposed_switched_conv2d(const SwitchedConv2dArgs<c10::SymInt>& args);
SwitchedGradients decomposed_switched_conv2d_backward(const SwitchedConv2dBackwardArgs<c10::SymInt>& args);

}  // namespace bap_kernels
