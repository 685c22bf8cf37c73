// Autograd of the switched convolution: the backward is an op of its own. All other derivatives are those of PyTorch's
// operators: see decomposed.h.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>

#include "autograd/decomposed.h"
#include "dispatch/choice.h"
#include "ops/switched_call.h"

namespace bap_kernels {
namespace {

using c10::SymInt;
using c10::SymIntArrayRef;
using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

using ForwardSchema = at::Tensor(const at::Tensor&, const at::Tensor&, const OptionalTensor&, const at::Tensor&,
                                 SymIntArrayRef, SymIntArrayRef, SymIntArrayRef, SymInt, bool, const OptionalTensor&,
                                 int64_t);
using BackwardSchema = SwitchedGradients(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                         SymIntArrayRef, SymIntArrayRef, SymIntArrayRef, SymInt, bool, SwitchedMask,
                                         const OptionalTensor&, int64_t);

auto& forward_op() {
  static auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("bap_kernels::switched_conv2d", "").typed<ForwardSchema>();
  return op;
}

auto& backward_op() {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("bap_kernels::switched_conv2d_backward", "")
                       .typed<BackwardSchema>();
  return op;
}

class ForwardFunction : public torch::autograd::Function<ForwardFunction> {
 public:
  static Variable forward(AutogradContext* ctx, const Variable& input, const Variable& weight,
                          const OptionalTensor& bias, const Variable& switches, SymIntArrayRef stride,
                          SymIntArrayRef padding, SymIntArrayRef dilation, const SymInt& groups, bool off_gradient,
                          const OptionalTensor& read, int64_t reader) {
    at::AutoDispatchBelowADInplaceOrView below;
    Variable output =
        forward_op().call(input, weight, bias, switches, stride, padding, dilation, groups, off_gradient, read, reader);
    variable_list saved{input, weight, switches};
    if (has_value(read)) saved.push_back(*read);
    ctx->save_for_backward(saved);
    // The backward may run in another block, or in a thread of the engine that does not know the caller's backend.
    ctx->saved_data["backend"] = get_backend();
    ctx->saved_data["stride"] = stride;
    ctx->saved_data["padding"] = padding;
    ctx->saved_data["dilation"] = dilation;
    ctx->saved_data["groups"] = groups;
    ctx->saved_data["off_gradient"] = off_gradient;
    ctx->saved_data["bias"] = has_value(bias);
    ctx->saved_data["reader"] = reader;
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_output) {
    const BackendScope scope(ctx->saved_data["backend"].toStringRef());
    const auto saved = ctx->get_saved_variables();
    // needs_input_grad counts tensors that are there: an absent bias shifts the place of the switch.
    const bool bias = ctx->saved_data["bias"].toBool();
    const SwitchedMask mask = {ctx->needs_input_grad(0), ctx->needs_input_grad(1), bias && ctx->needs_input_grad(2),
                               ctx->needs_input_grad(bias ? 3 : 2)};
    auto [grad_input, grad_weight, grad_bias, grad_switch] = backward_op().call(
        grad_output[0], saved[0], saved[1], saved[2], ctx->saved_data["stride"].toSymIntVector(),
        ctx->saved_data["padding"].toSymIntVector(), ctx->saved_data["dilation"].toSymIntVector(),
        ctx->saved_data["groups"].toSymInt(), ctx->saved_data["off_gradient"].toBool(), mask,
        saved.size() > 3 ? OptionalTensor(saved[3]) : OptionalTensor(), ctx->saved_data["reader"].toInt());
    variable_list grads(11);
    if (mask[kGradInput]) grads[0] = grad_input;
    if (mask[kGradWeight]) grads[1] = grad_weight;
    if (mask[kGradBias]) grads[2] = grad_bias;
    if (mask[kGradSwitch]) grads[3] = grad_switch;
    return grads;
  }
};

at::Tensor switched_conv2d_autograd(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                                    const at::Tensor& switches, SymIntArrayRef stride, SymIntArrayRef padding,
                                    SymIntArrayRef dilation, SymInt groups, bool off_gradient,
                                    const OptionalTensor& read, int64_t reader) {
  if (C10_UNLIKELY(needs_decomposition({&input, &weight, bias.has_value() ? &*bias : nullptr, &switches}))) {
    return decomposed_switched_conv2d(input, weight, bias, switches, stride, padding, dilation, groups, off_gradient);
  }
  const bool tracked =
      c10::GradMode::is_enabled() && (input.requires_grad() || weight.requires_grad() || switches.requires_grad() ||
                                      (has_value(bias) && bias->requires_grad()));
  if (!tracked) {
    at::AutoDispatchBelowADInplaceOrView below;
    return forward_op().call(input, weight, bias, switches, stride, padding, dilation, std::move(groups), off_gradient,
                             read, reader);
  }
  return ForwardFunction::apply(input, weight, bias, switches, stride, padding, dilation, groups, off_gradient, read,
                                reader);
}

SwitchedGradients switched_conv2d_backward_autograd(const at::Tensor& grad_output, const at::Tensor& input,
                                                    const at::Tensor& weight, const at::Tensor& switches,
                                                    SymIntArrayRef stride, SymIntArrayRef padding,
                                                    SymIntArrayRef dilation, SymInt groups, bool off_gradient,
                                                    SwitchedMask mask, const OptionalTensor& read, int64_t reader) {
  const bool tracked = c10::GradMode::is_enabled() && (grad_output.requires_grad() || input.requires_grad() ||
                                                       weight.requires_grad() || switches.requires_grad());
  if (C10_UNLIKELY(tracked || needs_decomposition({&grad_output, &input, &weight, &switches}))) {
    return decomposed_switched_conv2d_backward(grad_output, input, weight, switches, stride, padding, dilation, groups,
                                               off_gradient, mask);
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return backward_op().call(grad_output, input, weight, switches, stride, padding, dilation, std::move(groups),
                            off_gradient, mask, read, reader);
}

}  // namespace

TORCH_LIBRARY_IMPL(bap_kernels, Autograd, m) {
  m.impl("switched_conv2d", switched_conv2d_autograd);
  m.impl("switched_conv2d_backward", switched_conv2d_backward_autograd);
}

}  // namespace bap_kernels
