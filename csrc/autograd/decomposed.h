// The ops as compositions of PyTorch's differentiable operators, for every derivative but the first in reverse mode:
// forward-mode AD, second derivatives, and the transforms of torch.func (grad, vjp, jvp, jacrev, jacfwd, hessian,
// vmap). What no list names is never read, so that its NaN reaches neither results nor derivatives.
#pragma once

#include "ops/switched_call.h"

namespace bap_kernels {

// Whether a transform of torch.func is at work on this thread, or one of the tensors has a forward-mode tangent;
// null stands for an absent one.
bool needs_decomposition(std::initializer_list<const at::Tensor*> tensors);

// Raises NotImplementedError, with the op's name, in these cases.
void refuse_decomposition(const char* op, std::initializer_list<const at::Tensor*> tensors);

at::Tensor decomposed_gathered_conv2d(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                                      const OptionalTensor& in_index, const OptionalTensor& out_index,
                                      c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
                                      c10::SymIntArrayRef dilation, const c10::SymInt& groups);

GradientTriple decomposed_gathered_conv2d_backward(const at::Tensor& grad_output, const at::Tensor& input,
                                                   const at::Tensor& weight, const OptionalTensor& in_index,
                                                   const OptionalTensor& out_index, c10::SymIntArrayRef stride,
                                                   c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                                                   const c10::SymInt& groups, std::array<bool, 3> mask);

at::Tensor decomposed_switched_conv2d(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                                      const at::Tensor& switches, c10::SymIntArrayRef stride,
                                      c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                                      const c10::SymInt& groups, bool off_gradient);

SwitchedGradients decomposed_switched_conv2d_backward(const at::Tensor& grad_output, const at::Tensor& input,
                                                      const at::Tensor& weight, const at::Tensor& switches,
                                                      c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
                                                      c10::SymIntArrayRef dilation, const c10::SymInt& groups,
                                                      bool off_gradient, SwitchedMask mask);

}  // namespace bap_kernels
