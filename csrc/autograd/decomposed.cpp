// The ops as compositions of PyTorch's differentiable operators. See decomposed.h.
//   gathered:  y = conv(x[:, in], w[out, in], b[out])
//   switched:  y = conv(x * s, w, b), where x and w of channels that are off take part only as far as they are finite
#include "autograd/decomposed.h"

#include <ATen/OpMathType.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/index_add.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include "backends/aten/convolution.h"

namespace bap_kernels {
namespace {

using c10::SymInt;
using c10::SymIntArrayRef;

// The keys of a transform are included as long as one is entered. The headers of torch.func need others that PyTorch
// does not install.
bool functorch_active() {
  return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerBackMode);
}

// Whether the host can read a tensor's values: not while tracing, and not on other devices.
bool readable(const at::Tensor& t) {
  return t.device().is_cpu() && !c10::impl::TorchDispatchModeTLS::any_modes_set() &&
         !t.key_set().has_any(c10::DispatchKeySet(
             {c10::DispatchKey::Python, c10::DispatchKey::Functionalize, c10::DispatchKey::FuncTorchBatched}));
}

// Nothing where the transforms do not let the values out, as those that vmap maps over.
std::optional<bool> is_true(const at::Tensor& condition) {
  try {
    return condition.item<bool>();
  } catch (const c10::Error&) {
    return std::nullopt;
  }
}

// No transform takes part in calls while it lives.
struct Plainly {
  c10::impl::ExcludeDispatchKeyGuard guard{
      c10::DispatchKeySet({c10::DispatchKey::FuncTorchDynamicLayerFrontMode,
                           c10::DispatchKey::FuncTorchDynamicLayerBackMode, c10::DispatchKey::FuncTorchGradWrapper})};
};

// A list without the wrapper that a transform puts around each tensor, by the only way that its headers leave.
at::Tensor unwrapped(const at::Tensor& list) {
  std::vector<int32_t> values;
  for (int64_t i = 0; i < list.size(0); ++i) values.push_back(list.select(0, i).item<int32_t>());
  const Plainly plainly;
  at::Tensor plain = at::empty({static_cast<int64_t>(values.size())}, at::kInt);
  std::copy(values.begin(), values.end(), plain.mutable_data_ptr<int32_t>());
  return plain;
}

// Whether a list is in range and without repeats, by few operators.
bool sound(const at::Tensor& list, int64_t channels) {
  if (list.size(0) == 0) return true;
  const at::Tensor sorted = std::get<0>(list.sort());
  const int64_t n = list.size(0);
  const at::Tensor repeats = (sorted.narrow(0, 1, n - 1) == sorted.narrow(0, 0, n - 1)).any();
  const at::Tensor outside = at::logical_or(sorted.select(0, 0) < 0, sorted.select(0, n - 1) >= channels);
  return !is_true(at::logical_or(repeats, outside)).value_or(false);
}

void refuse_mapped(const char* op, const char* name, const OptionalTensor& list) {
  TORCH_CHECK_NOT_IMPLEMENTED(!has_value(list) || !list->key_set().has(c10::DispatchKey::FuncTorchBatched), op,
                              "(): expected `", name, "` to be one list for all samples, got one that vmap maps over. ",
                              "Hint: pass it with in_dims=None, or call the layer in a loop over lists.");
}

void check_lists(const char* op, const OptionalTensor& in_index, const OptionalTensor& out_index,
                 const ConvShape<SymInt>& s) {
  refuse_mapped(op, "in_index", in_index);
  refuse_mapped(op, "out_index", out_index);
  const auto channels_in = s.channels_in.maybe_as_int(), channels_out = s.channels_out.maybe_as_int();
  if (!channels_in || !channels_out) return;
  for (const OptionalTensor* list : {&in_index, &out_index}) {
    if (has_value(*list) && !readable(**list)) return;
  }
  bool right = !(has_value(in_index) && !sound(*in_index, *channels_in)) &&
               !(has_value(out_index) && !sound(*out_index, *channels_out));
  if (right && s.depthwise && has_value(in_index)) right = !is_true((*in_index != *out_index).any()).value_or(false);
  if (right) return;
  const at::Tensor in = has_value(in_index) ? unwrapped(*in_index) : at::Tensor();
  const at::Tensor out = has_value(out_index) ? unwrapped(*out_index) : at::Tensor();
  const Plainly plainly;
  check_list_values(op, in, out, *channels_in, *channels_out, s.depthwise);
}

at::Tensor selected(const at::Tensor& t, int64_t dim, const OptionalTensor& index) {
  return has_value(index) ? t.index_select(dim, *index) : t;
}

// `part` at the listed places of zeros of `whole`'s size.
at::Tensor spread(const at::Tensor& part, int64_t dim, const OptionalTensor& index, const SymInt& whole) {
  if (!has_value(index)) return part;
  std::vector<SymInt> sizes = part.sym_sizes().vec();
  sizes[dim] = whole;
  return at::zeros_symint(sizes, part.options()).index_add(dim, *index, part);
}

// The convolution of one geometry, and its gradients, with the padding of four sides that PyTorch's own lacks.
struct Geometry {
  SymIntArrayRef stride, padding, dilation;

  bool symmetric() const { return padding[kTop] == padding[kBottom] && padding[kLeft] == padding[kRight]; }
  std::array<SymInt, 2> rest() const {
    if (symmetric()) return {padding[kTop], padding[kLeft]};
    return {SymInt(0), SymInt(0)};
  }
  // The options as PyTorch's convolution takes them, where they are plain numbers; `pair` holds the padding.
  std::optional<ConvolutionOptions> concrete(const SymInt& groups, std::array<int64_t, 2>& pair) const {
    for (const SymIntArrayRef list : {stride, padding, dilation, SymIntArrayRef(groups)}) {
      if (!c10::asIntArrayRefSlowOpt(list).has_value()) return std::nullopt;
    }
    const auto sides = c10::asIntArrayRefUnchecked(padding);
    pair = symmetric() ? std::array<int64_t, 2>{sides[kTop], sides[kLeft]} : std::array<int64_t, 2>{0, 0};
    return ConvolutionOptions{c10::asIntArrayRefUnchecked(stride), pair, c10::asIntArrayRefUnchecked(dilation),
                              groups.expect_int()};
  }
  at::Tensor padded(const at::Tensor& x) const {
    if (symmetric()) return x;
    const std::array<SymInt, 4> sides = {padding[kLeft], padding[kRight], padding[kTop], padding[kBottom]};
    return at::constant_pad_nd_symint(x, sides);
  }
  at::Tensor convolve(const at::Tensor& x, const at::Tensor& w, const OptionalTensor& bias,
                      const SymInt& groups) const {
    std::array<int64_t, 2> pair{};
    if (const auto o = concrete(groups, pair); o && convolution_fails(padded(x), w, *o, /*weight_gradient=*/true)) {
      return convolution(padded(x), w, bias, *o);
    }
    return at::convolution_symint(padded(x), w, bias, stride, rest(), dilation, false,
                                  std::array<SymInt, 2>{SymInt(0), SymInt(0)}, groups);
  }
  std::pair<at::Tensor, at::Tensor> gradients(const at::Tensor& grad_output, const at::Tensor& x, const at::Tensor& w,
                                              const SymInt& groups, bool input, bool weight) const {
    auto [dx, dw, db] =
        at::convolution_backward_symint(grad_output, padded(x), w, std::nullopt, stride, rest(), dilation, false,
                                        std::array<SymInt, 2>{SymInt(0), SymInt(0)}, groups, {input, weight, false});
    if (input && !symmetric()) {
      dx = dx.narrow_symint(2, padding[kTop], x.sym_size(2)).narrow_symint(3, padding[kLeft], x.sym_size(3));
    }
    return {dx, dw};
  }
};

at::Tensor constant_result(const ConvShape<SymInt>& s, const at::Tensor& input, const OptionalTensor& bias) {
  const std::array<SymInt, 4> sizes = {s.batch, s.kept_out, s.out_h, s.out_w};
  const at::Tensor y = at::zeros_symint(sizes, input.options());
  return has_value(bias) ? y + bias->view({1, -1, 1, 1}) : y;
}

// `t` with zeros for what is not finite in channels that are off: by those the switch's derivative would be NaN, and
// zero times NaN in the result as well.
at::Tensor finite_where_off(const at::Tensor& t, const at::Tensor& on) {
  return at::where(at::logical_or(on, at::isfinite(t)), t, at::zeros({}, t.options()));
}

struct SwitchedParts {
  ConvShape<SymInt> shape;
  at::Tensor on, scale, x, w;  // in the input's dtype; `scale` (1, C_in, 1, 1)
};

SwitchedParts switched_parts(const char* op, const SwitchedConv2dArgs<SymInt>& a) {
  const auto s = check_switched_conv2d<SymInt>(op, a);
  const auto& [input, weight, switches] = std::tie(a.input, a.weight, a.switches);
  if (readable(switches)) {
    const bool right = is_true(at::logical_or(switches == 0, switches == 1).all()).value_or(true);
    TORCH_CHECK_VALUE(right, op, "(): expected `switch` to hold zeros and ones, got other values. Hint: compare ",
                      "scores with a threshold.");
  }
  const at::Tensor on = switches != 0;
  const at::Tensor scale = switches.to(input.scalar_type()).view({1, -1, 1, 1});
  const at::Tensor on_weight = s.depthwise ? on.view({-1, 1, 1, 1}) : on.view({1, -1, 1, 1});
  return {s, on, scale, finite_where_off(input, on.view({1, -1, 1, 1})), finite_where_off(weight, on_weight)};
}

}  // namespace

bool needs_decomposition(std::initializer_list<const at::Tensor*> tensors) {
  for (const at::Tensor* t : tensors) {
    if (t != nullptr && t->defined() && t->_fw_grad(/*level=*/0).defined()) return true;
  }
  return functorch_active();
}

void refuse_decomposition(const char* op, std::initializer_list<const at::Tensor*> tensors) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !needs_decomposition(tensors), op,
      "(): expected a call outside torch.func and forward-mode AD, got one that they "
      "differentiate or map. Hint: it serves inference; transform the layers themselves, before "
      "they are planned or mixed.");
}

at::Tensor decomposed_gathered_conv2d(const GatheredConv2dArgs<SymInt>& args) {
  const char* op = GatheredConv2d::kName;
  const auto& [input, weight, bias, in_index, out_index, stride, padding, dilation, groups] =
      static_cast<const ConvArgs<SymInt>&>(args);
  const auto s = check_conv<SymInt>(op, args);
  check_lists(op, in_index, out_index, s);
  const auto listed_bias = has_value(bias) ? OptionalTensor(selected(*bias, 0, out_index)) : std::nullopt;
  if (s.trivial()) return constant_result(s, input, listed_bias);
  const at::Tensor filters = selected(weight, 0, out_index);
  const Geometry geometry{stride, padding, dilation};
  return geometry.convolve(selected(input, 1, in_index), s.depthwise ? filters : selected(filters, 1, in_index),
                           listed_bias, s.depthwise ? s.kept_in : SymInt(1));
}

GradientTriple decomposed_gathered_conv2d_backward(const GatheredConv2dBackwardArgs<SymInt>& args) {
  const char* op = GatheredConv2dBackward::kName;
  const auto& [grad_output, input, weight, in_index, out_index, stride, padding, dilation, groups, mask] = args;
  const auto s = check_gathered_conv2d_backward<SymInt>(op, args);
  check_lists(op, in_index, out_index, s);
  const auto none = [&args] { return at::empty({0}, args.input.options()); };
  at::Tensor grad_input = none(), grad_weight = none(), grad_bias = none();
  if (s.trivial()) {
    if (mask[0]) grad_input = at::zeros_like(input);
    if (mask[1]) grad_weight = at::zeros_like(weight);
  } else if (mask[0] || mask[1]) {
    const OptionalTensor weight_list = s.depthwise ? OptionalTensor() : in_index;
    const Geometry geometry{stride, padding, dilation};
    const auto [dx, dw] = geometry.gradients(grad_output, selected(input, 1, in_index),
                                             selected(selected(weight, 0, out_index), 1, weight_list),
                                             s.depthwise ? s.kept_in : SymInt(1), mask[0], mask[1]);
    if (mask[0]) grad_input = spread(dx, 1, in_index, s.channels_in);
    if (mask[1]) grad_weight = spread(spread(dw, 1, weight_list, s.channels_in), 0, out_index, s.channels_out);
  }
  if (mask[2]) grad_bias = spread(grad_output.sum({0, 2, 3}), 0, out_index, s.channels_out);
  return {grad_input, grad_weight, grad_bias};
}

at::Tensor decomposed_switched_conv2d(const SwitchedConv2dArgs<SymInt>& a) {
  const SwitchedParts p = switched_parts(SwitchedConv2d::kName, a);
  if (p.shape.trivial()) return constant_result(p.shape, a.input, a.bias);
  at::Tensor scale = p.scale;
  if (!a.off_gradient) scale = at::where(p.on.view({1, -1, 1, 1}), scale, at::zeros({}, scale.options()));
  const Geometry geometry{a.stride, a.padding, a.dilation};
  return geometry.convolve(p.x * scale, p.w, a.bias, a.groups);
}

SwitchedGradients decomposed_switched_conv2d_backward(const SwitchedConv2dBackwardArgs<SymInt>& a) {
  const char* op = SwitchedConv2dBackward::kName;
  const SwitchedParts p = switched_parts(op, a.forward());
  check_grad_output<SymInt>(op, a.grad_output, p.shape, a.input);
  const SwitchedMask& mask = a.mask;
  const auto none = [](const at::Tensor& like) { return at::empty({0}, like.options()); };
  SwitchedGradients grads{none(a.input), none(a.input), none(a.input), none(a.switches)};
  auto& [grad_input, grad_weight, grad_bias, grad_switch] = grads;
  if (mask[kGradBias]) grad_bias = a.grad_output.sum({0, 2, 3});
  if (p.shape.trivial()) {
    if (mask[kGradInput]) grad_input = at::zeros_like(a.input);
    if (mask[kGradWeight]) grad_weight = at::zeros_like(a.weight);
    if (mask[kGradSwitch]) grad_switch = at::zeros_like(a.switches);
    return grads;
  }
  const bool wants_input = mask[kGradInput] || mask[kGradSwitch];
  if (!wants_input && !mask[kGradWeight]) return grads;
  const Geometry geometry{a.stride, a.padding, a.dilation};
  const auto [dx, dw] = geometry.gradients(a.grad_output, p.x * p.scale, p.w, a.groups, wants_input, mask[kGradWeight]);
  if (mask[kGradInput]) grad_input = dx * p.scale;
  if (mask[kGradWeight]) grad_weight = dw;
  if (mask[kGradSwitch]) {
    const auto wide = at::toOpMathType(dx.scalar_type());
    at::Tensor ds = (p.x.to(wide) * dx.to(wide)).sum({0, 2, 3}).to(a.switches.scalar_type());
    if (!a.off_gradient) ds = at::where(p.on, ds, at::zeros({}, ds.options()));
    grad_switch = ds;
  }
  return grads;
}

TORCH_LIBRARY_IMPL(bap_kernels, FuncTorchBatched, m) {
  implement<GatheredConv2d, decomposed_gathered_conv2d>(m);
  implement<SwitchedConv2d, decomposed_switched_conv2d>(m);
}

}  // namespace bap_kernels
