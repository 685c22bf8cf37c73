// Autograd of the switched convolution: the backward is an op of its own. All other derivatives are those of PyTorch's
// operators: see decomposed.h.
#include <torch/csrc/autograd/custom_function.h>

#include "autograd/decomposed.h"
#include "dispatch/backend.h"
#include "dispatch/winograd.h"

namespace bap_kernels {
namespace {

using c10::SymInt;
using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

// Its arguments are the members of SwitchedConv2dArgs, one by one: autograd looks for tensors among them.
class ForwardFunction : public torch::autograd::Function<ForwardFunction> {
 public:
  template <class... Members>
  static Variable forward(AutogradContext* ctx, const Members&... members) {
    const SwitchedConv2dArgs<SymInt> a{members...};
    const at::AutoDispatchBelowADInplaceOrView below;
    Variable output = call<SwitchedConv2d>(a);
    variable_list saved{a.input, a.weight, a.switches};
    if (has_value(a.read)) saved.push_back(*a.read);
    ctx->save_for_backward(saved);
    // The backward may run in another block, or in a thread of the engine that does not know the caller's backend.
    ctx->saved_data["backend"] = get_backend();
    ctx->saved_data["winograd"] = get_winograd();
    ctx->saved_data["stride"] = a.stride;
    ctx->saved_data["padding"] = a.padding;
    ctx->saved_data["dilation"] = a.dilation;
    ctx->saved_data["groups"] = a.groups;
    ctx->saved_data["off_gradient"] = a.off_gradient;
    ctx->saved_data["bias"] = has_value(a.bias);
    ctx->saved_data["reader"] = a.reader;
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_output) {
    const BackendScope scope(ctx->saved_data["backend"].toStringRef());
    const WinogradScope winograd(ctx->saved_data["winograd"].toBool());
    const auto saved = ctx->get_saved_variables();
    // needs_input_grad counts tensors that are there: an absent bias shifts the place of the switch.
    const bool bias = ctx->saved_data["bias"].toBool();
    const SwitchedMask mask = {ctx->needs_input_grad(0), ctx->needs_input_grad(1), bias && ctx->needs_input_grad(2),
                               ctx->needs_input_grad(bias ? 3 : 2)};
    const auto stride = ctx->saved_data["stride"].toSymIntVector();
    const auto padding = ctx->saved_data["padding"].toSymIntVector();
    const auto dilation = ctx->saved_data["dilation"].toSymIntVector();
    const OptionalTensor read = saved.size() > 3 ? OptionalTensor(saved[3]) : std::nullopt;
    const auto [grad_input, grad_weight, grad_bias, grad_switch] = call<SwitchedConv2dBackward>(
        {grad_output[0], saved[0], saved[1], saved[2], stride, padding, dilation, ctx->saved_data["groups"].toSymInt(),
         ctx->saved_data["off_gradient"].toBool(), mask, read, ctx->saved_data["reader"].toInt()});
    variable_list grads(std::tuple_size_v<decltype(std::declval<SwitchedConv2dArgs<SymInt>>().tie())>);
    if (mask[kGradInput]) grads[0] = grad_input;
    if (mask[kGradWeight]) grads[1] = grad_weight;
    if (mask[kGradBias]) grads[2] = grad_bias;
    if (mask[kGradSwitch]) grads[3] = grad_switch;
    return grads;
  }
};

at::Tensor forward(const SwitchedConv2dArgs<SymInt>& a) {
  const at::Tensor* bias = a.bias.has_value() ? &*a.bias : nullptr;
  if (C10_UNLIKELY(needs_decomposition({&a.input, &a.weight, bias, &a.switches}))) {
    return decomposed_switched_conv2d(a);
  }
  const bool tracked =
      c10::GradMode::is_enabled() && (a.input.requires_grad() || a.weight.requires_grad() ||
                                      a.switches.requires_grad() || (has_value(a.bias) && a.bias->requires_grad()));
  if (!tracked) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return call<SwitchedConv2d>(a);
  }
  return std::apply([](const auto&... members) { return ForwardFunction::apply(members...); }, a.tie());
}

SwitchedGradients backward(const SwitchedConv2dBackwardArgs<SymInt>& a) {
  const bool tracked = c10::GradMode::is_enabled() && (a.grad_output.requires_grad() || a.input.requires_grad() ||
                                                       a.weight.requires_grad() || a.switches.requires_grad());
  if (C10_UNLIKELY(tracked || needs_decomposition({&a.grad_output, &a.input, &a.weight, &a.switches}))) {
    return decomposed_switched_conv2d_backward(a);
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return call<SwitchedConv2dBackward>(a);
}

}  // namespace

TORCH_LIBRARY_IMPL(bap_kernels, Autograd, m) {
  implement<SwitchedConv2d, forward>(m);
  implement<SwitchedConv2dBackward, backward>(m);
}

}  // namespace bap_kernels
