// Autograd of the gathered convolution: the backward is an op of its own. All other derivatives are those of PyTorch's
// operators: see decomposed.h.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>

#include "autograd/decomposed.h"
#include "dispatch/choice.h"
#include "dispatch/packed_cache.h"
#include "ops/gathered_conv2d_copied.h"
#include "ops/gathered_conv2d_mixed.h"

namespace bap_kernels {
namespace {

using c10::SymInt;
using c10::SymIntArrayRef;
using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;
using Triple = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

using ForwardSchema = at::Tensor(const at::Tensor&, const at::Tensor&, const OptionalTensor&, const OptionalTensor&,
                                 const OptionalTensor&, SymIntArrayRef, SymIntArrayRef, SymIntArrayRef, SymInt, bool);
using BackwardSchema = Triple(const at::Tensor&, const at::Tensor&, const at::Tensor&, const OptionalTensor&,
                              const OptionalTensor&, SymIntArrayRef, SymIntArrayRef, SymIntArrayRef, SymInt,
                              std::array<bool, 3>);

auto& forward_op() {
  static auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("bap_kernels::gathered_conv2d", "").typed<ForwardSchema>();
  return op;
}

auto& backward_op() {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("bap_kernels::gathered_conv2d_backward", "")
                       .typed<BackwardSchema>();
  return op;
}

OptionalTensor if_defined(const Variable& v) { return v.defined() ? OptionalTensor(v) : std::nullopt; }

const at::Tensor* pointer(const OptionalTensor& t) { return t.has_value() ? &*t : nullptr; }

class ForwardFunction : public torch::autograd::Function<ForwardFunction> {
 public:
  static Variable forward(AutogradContext* ctx, const Variable& input, const Variable& weight,
                          const OptionalTensor& bias, const OptionalTensor& in_index, const OptionalTensor& out_index,
                          SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation, const SymInt& groups,
                          bool cache_packed) {
    at::AutoDispatchBelowADInplaceOrView below;
    std::optional<PackedCache::Tracked> tracked;
    if (weight.requires_grad()) tracked.emplace(weight);
    Variable output =
        forward_op().call(input, weight, bias, in_index, out_index, stride, padding, dilation, groups, cache_packed);
    ctx->save_for_backward({input, weight, in_index.value_or(at::Tensor()), out_index.value_or(at::Tensor())});
    // The backward may run in another block, or in a thread of the engine that does not know the caller's backend.
    ctx->saved_data["backend"] = get_backend();
    ctx->saved_data["stride"] = stride;
    ctx->saved_data["padding"] = padding;
    ctx->saved_data["dilation"] = dilation;
    ctx->saved_data["groups"] = groups;
    // needs_input_grad counts tensors that are there, so an absent bias would shift its place.
    ctx->saved_data["bias"] = has_value(bias) && bias->requires_grad();
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_output) {
    const BackendScope scope(ctx->saved_data["backend"].toStringRef());
    const auto saved = ctx->get_saved_variables();
    const std::array<bool, 3> mask = {ctx->needs_input_grad(0), ctx->needs_input_grad(1),
                                      ctx->saved_data["bias"].toBool()};
    auto [grad_input, grad_weight, grad_bias] =
        backward_op().call(grad_output[0], saved[0], saved[1], if_defined(saved[2]), if_defined(saved[3]),
                           ctx->saved_data["stride"].toSymIntVector(), ctx->saved_data["padding"].toSymIntVector(),
                           ctx->saved_data["dilation"].toSymIntVector(), ctx->saved_data["groups"].toSymInt(), mask);
    variable_list grads(10);
    if (mask[0]) grads[0] = grad_input;
    if (mask[1]) grads[1] = grad_weight;
    if (mask[2]) grads[2] = grad_bias;
    return grads;
  }
};

at::Tensor gathered_conv2d_autograd(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                                    const OptionalTensor& in_index, const OptionalTensor& out_index,
                                    SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
                                    SymInt groups, bool cache_packed) {
  if (C10_UNLIKELY(needs_decomposition({&input, &weight, pointer(bias)}))) {
    return decomposed_gathered_conv2d(input, weight, bias, in_index, out_index, stride, padding, dilation, groups);
  }
  const bool tracked = c10::GradMode::is_enabled() &&
                       (input.requires_grad() || weight.requires_grad() || (has_value(bias) && bias->requires_grad()));
  // Recording a node costs more than a small convolution, so it is left out when nothing asks for a gradient.
  if (!tracked) {
    at::AutoDispatchBelowADInplaceOrView below;
    return forward_op().call(input, weight, bias, in_index, out_index, stride, padding, dilation, std::move(groups),
                             cache_packed);
  }
  return ForwardFunction::apply(input, weight, bias, in_index, out_index, stride, padding, dilation, groups,
                                cache_packed);
}

Triple gathered_conv2d_backward_autograd(const at::Tensor& grad_output, const at::Tensor& input,
                                         const at::Tensor& weight, const OptionalTensor& in_index,
                                         const OptionalTensor& out_index, SymIntArrayRef stride, SymIntArrayRef padding,
                                         SymIntArrayRef dilation, SymInt groups, std::array<bool, 3> mask) {
  const bool tracked =
      c10::GradMode::is_enabled() && (grad_output.requires_grad() || input.requires_grad() || weight.requires_grad());
  if (C10_UNLIKELY(tracked || needs_decomposition({&grad_output, &input, &weight}))) {
    return decomposed_gathered_conv2d_backward(grad_output, input, weight, in_index, out_index, stride, padding,
                                               dilation, groups, mask);
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return backward_op().call(grad_output, input, weight, in_index, out_index, stride, padding, dilation,
                            std::move(groups), mask);
}

void refuse_gradients(const char* op, const at::Tensor& input, const at::Tensor& weight,
                      std::initializer_list<const OptionalTensor*> others) {
  bool tracked = input.requires_grad() || weight.requires_grad();
  refuse_decomposition(op, {&input, &weight});
  for (const OptionalTensor* t : others) {
    tracked = tracked || (has_value(*t) && (*t)->requires_grad());
    refuse_decomposition(op, {pointer(*t)});
  }
  TORCH_CHECK_NOT_IMPLEMENTED(!(tracked && c10::GradMode::is_enabled()), op,
                              "(): expected tensors that need no gradient, got one with "
                              "requires_grad=True. Hint: it serves inference; call it under torch.no_grad().");
}

using FusedSchema = at::Tensor(const at::Tensor&, const at::Tensor&, const OptionalTensor&, const OptionalTensor&,
                               const OptionalTensor&, SymIntArrayRef, SymIntArrayRef, SymIntArrayRef, SymInt,
                               const OptionalTensor&, const OptionalTensor&, bool, const OptionalTensor&,
                               const OptionalTensor&, const OptionalTensor&, bool, bool, const OptionalTensor&);

at::Tensor fused_autograd(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                          const OptionalTensor& in_index, const OptionalTensor& out_index, SymIntArrayRef stride,
                          SymIntArrayRef padding, SymIntArrayRef dilation, SymInt groups,
                          const OptionalTensor& in_scale, const OptionalTensor& in_shift, bool in_relu,
                          const OptionalTensor& out_scale, const OptionalTensor& out_shift,
                          const OptionalTensor& residual, bool out_relu, bool cache_packed,
                          const OptionalTensor& weight_index) {
  refuse_gradients("_gathered_conv2d_fused", input, weight,
                   {&bias, &in_scale, &in_shift, &out_scale, &out_shift, &residual});
  at::AutoDispatchBelowADInplaceOrView below;
  static auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("bap_kernels::_gathered_conv2d_fused", "").typed<FusedSchema>();
  return op.call(input, weight, bias, in_index, out_index, stride, padding, dilation, std::move(groups), in_scale,
                 in_shift, in_relu, out_scale, out_shift, residual, out_relu, cache_packed, weight_index);
}

using CopiedSchema = ResultAndCopy(const at::Tensor&, const at::Tensor&, const OptionalTensor&, const OptionalTensor&,
                                   const OptionalTensor&, SymIntArrayRef, SymIntArrayRef, SymIntArrayRef, SymInt,
                                   const OptionalTensor&, const OptionalTensor&, bool, const OptionalTensor&,
                                   const OptionalTensor&, const OptionalTensor&, bool, const at::Tensor&, bool,
                                   const OptionalTensor&);

ResultAndCopy copied_autograd(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                              const OptionalTensor& in_index, const OptionalTensor& out_index, SymIntArrayRef stride,
                              SymIntArrayRef padding, SymIntArrayRef dilation, SymInt groups,
                              const OptionalTensor& in_scale, const OptionalTensor& in_shift, bool in_relu,
                              const OptionalTensor& out_scale, const OptionalTensor& out_shift,
                              const OptionalTensor& residual, bool out_relu, const at::Tensor& copy_index,
                              bool cache_packed, const OptionalTensor& weight_index) {
  refuse_gradients("_gathered_conv2d_fused_copied", input, weight,
                   {&bias, &in_scale, &in_shift, &out_scale, &out_shift, &residual});
  at::AutoDispatchBelowADInplaceOrView below;
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("bap_kernels::_gathered_conv2d_fused_copied", "")
                       .typed<CopiedSchema>();
  return op.call(input, weight, bias, in_index, out_index, stride, padding, dilation, std::move(groups), in_scale,
                 in_shift, in_relu, out_scale, out_shift, residual, out_relu, copy_index, cache_packed, weight_index);
}

using MixedSchema = at::Tensor(const at::Tensor&, const at::Tensor&, const OptionalTensor&, const OptionalTensorList&,
                               c10::IntArrayRef, SymIntArrayRef, SymIntArrayRef, SymIntArrayRef, bool);

at::Tensor mixed_autograd(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                          const OptionalTensorList& in_indices, c10::IntArrayRef counts, SymIntArrayRef stride,
                          SymIntArrayRef padding, SymIntArrayRef dilation, bool cache_packed) {
  refuse_gradients("_gathered_conv2d_mixed", input, weight, {&bias});
  at::AutoDispatchBelowADInplaceOrView below;
  static auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("bap_kernels::_gathered_conv2d_mixed", "").typed<MixedSchema>();
  return op.call(input, weight, bias, in_indices, counts, stride, padding, dilation, cache_packed);
}

}  // namespace

TORCH_LIBRARY_IMPL(bap_kernels, Autograd, m) {
  m.impl("_gathered_conv2d_mixed", mixed_autograd);
  m.impl("_gathered_conv2d_fused", fused_autograd);
  m.impl("_gathered_conv2d_fused_copied", copied_autograd);
  m.impl("gathered_conv2d", gathered_conv2d_autograd);
  m.impl("gathered_conv2d_backward", gathered_conv2d_backward_autograd);
}

}  // namespace bap_kernels
