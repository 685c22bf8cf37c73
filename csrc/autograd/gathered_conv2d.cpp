// Autograd of the gathered convolution: the backward is an op of its own. All other derivatives are those of PyTorch's
// operators: see decomposed.h.
#include <torch/csrc/autograd/custom_function.h>

#include <optional>

#include "autograd/decomposed.h"
#include "dispatch/backend.h"
#include "dispatch/packed_cache.h"
#include "dispatch/winograd.h"

namespace bap_kernels {
namespace {

using c10::SymInt;
using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

OptionalTensor if_defined(const Variable& v) { return v.defined() ? OptionalTensor(v) : std::nullopt; }

const at::Tensor* pointer(const OptionalTensor& t) { return t.has_value() ? &*t : nullptr; }

// Its arguments are the members of GatheredConv2dArgs, one by one: autograd looks for tensors among them.
class ForwardFunction : public torch::autograd::Function<ForwardFunction> {
 public:
  template <class... Members>
  static Variable forward(AutogradContext* ctx, const Members&... members) {
    const GatheredConv2dArgs<SymInt> a{members...};
    const at::AutoDispatchBelowADInplaceOrView below;
    std::optional<PackedCache::Tracked> tracked;
    if (a.weight.requires_grad()) tracked.emplace(a.weight);
    Variable output = call<GatheredConv2d>(a);
    ctx->save_for_backward({a.input, a.weight, a.in_index.value_or(at::Tensor()), a.out_index.value_or(at::Tensor())});
    // The backward may run in another block, or in a thread of the engine that does not know the caller's backend.
    ctx->saved_data["backend"] = get_backend();
    ctx->saved_data["winograd"] = get_winograd();
    ctx->saved_data["stride"] = a.stride;
    ctx->saved_data["padding"] = a.padding;
    ctx->saved_data["dilation"] = a.dilation;
    ctx->saved_data["groups"] = a.groups;
    // needs_input_grad counts tensors that are there, so an absent bias would shift its place.
    ctx->saved_data["bias"] = has_value(a.bias) && a.bias->requires_grad();
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_output) {
    const BackendScope scope(ctx->saved_data["backend"].toStringRef());
    const WinogradScope winograd(ctx->saved_data["winograd"].toBool());
    const auto saved = ctx->get_saved_variables();
    const OptionalTensor in_index = if_defined(saved[2]), out_index = if_defined(saved[3]);
    const auto stride = ctx->saved_data["stride"].toSymIntVector();
    const auto padding = ctx->saved_data["padding"].toSymIntVector();
    const auto dilation = ctx->saved_data["dilation"].toSymIntVector();
    const GradientMask mask = {ctx->needs_input_grad(0), ctx->needs_input_grad(1), ctx->saved_data["bias"].toBool()};
    const auto [grad_input, grad_weight, grad_bias] =
        call<GatheredConv2dBackward>({grad_output[0], saved[0], saved[1], in_index, out_index, stride, padding,
                                      dilation, ctx->saved_data["groups"].toSymInt(), mask});
    variable_list grads(std::tuple_size_v<decltype(std::declval<GatheredConv2dArgs<SymInt>>().tie())>);
    if (mask[0]) grads[0] = grad_input;
    if (mask[1]) grads[1] = grad_weight;
    if (mask[2]) grads[2] = grad_bias;
    return grads;
  }
};

at::Tensor forward(const GatheredConv2dArgs<SymInt>& a) {
  if (C10_UNLIKELY(needs_decomposition({&a.input, &a.weight, pointer(a.bias)}))) return decomposed_gathered_conv2d(a);
  const bool tracked = c10::GradMode::is_enabled() && (a.input.requires_grad() || a.weight.requires_grad() ||
                                                       (has_value(a.bias) && a.bias->requires_grad()));
  // Recording a node costs more than a small convolution, so it is left out when nothing asks for a gradient.
  if (!tracked) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return call<GatheredConv2d>(a);
  }
  return std::apply([](const auto&... members) { return ForwardFunction::apply(members...); }, a.tie());
}

GradientTriple backward(const GatheredConv2dBackwardArgs<SymInt>& a) {
  const bool tracked = c10::GradMode::is_enabled() &&
                       (a.grad_output.requires_grad() || a.input.requires_grad() || a.weight.requires_grad());
  if (C10_UNLIKELY(tracked || needs_decomposition({&a.grad_output, &a.input, &a.weight}))) {
    return decomposed_gathered_conv2d_backward(a);
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return call<GatheredConv2dBackward>(a);
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
                              "requires_grad=True. Hint: it serves inference; call it under "
                              "torch.no_grad().");
}

DualResult fused(const GatheredConv2dFusedArgs<SymInt>& a) {
  const Fusion& f = a.fusion;
  refuse_gradients(GatheredConv2dFused::kName, a.input, a.weight,
                   {&a.bias, &f.in_scale, &f.in_shift, &f.out_scale, &f.out_shift, &f.residual});
  const at::AutoDispatchBelowADInplaceOrView below;
  return call<GatheredConv2dFused>(a);
}

at::Tensor mixed(const GatheredConv2dMixedArgs<SymInt>& a) {
  refuse_gradients(GatheredConv2dMixed::kName, a.input, a.weight, {&a.bias});
  const at::AutoDispatchBelowADInplaceOrView below;
  return call<GatheredConv2dMixed>(a);
}

}  // namespace

TORCH_LIBRARY_IMPL(bap_kernels, Autograd, m) {
  implement<GatheredConv2d, forward>(m);
  implement<GatheredConv2dBackward, backward>(m);
  implement<GatheredConv2dFused, fused>(m);
  implement<GatheredConv2dMixed, mixed>(m);
}

}  // namespace bap_kernels
