// Backward of the switched convolution through PyTorch's convolution.
//   dx = conv_backward(dy, w) on channels that are on, zeros elsewhere;  dw likewise;  db = sum dy
//   ds[c] = sum over k, kh, kw of w[k, c, kh, kw] * dW[k, c, kh, kw] = sum over n, h, w of x[n, c, h, w] * dX[n, c, h,
//   w] where dW and dX are the gradients of the convolution on the unmasked input
// Sums of ds are in float64 for float64 and in float32 for all other dtypes.
#include <ATen/OpMathType.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include "backends/aten/convolution.h"
#include "backends/aten/switched_conv2d.h"
#include "ops/listed_channels.h"

namespace bap_kernels {
namespace {

struct InputAndWeight {
  at::Tensor input, weight;
};

// Gradients of the convolution of x with w, as many channels as they have; `x` may be undefined where only that of the
// input is wanted, for which its values are not needed.
InputAndWeight gradients_of(const SwitchedCall& c, const at::Tensor& grad_output, at::Tensor x, const at::Tensor& w,
                            bool want_input, bool want_weight) {
  const auto& s = c.shape;
  const bool symmetric = c.symmetric_padding();
  std::array<int64_t, 2> padding = {c.padding[kTop], c.padding[kLeft]};
  const int64_t channels = s.depthwise ? w.size(0) : w.size(1);
  if (!symmetric) padding = {0, 0};
  if (!x.defined()) {
    const int64_t height = s.height + (symmetric ? 0 : c.padding[kTop] + c.padding[kBottom]);
    const int64_t width = s.width + (symmetric ? 0 : c.padding[kLeft] + c.padding[kRight]);
    x = at::empty({s.batch, channels, height, width}, c.input.options().memory_format(c.format()));
  } else if (!symmetric) {
    x = at::constant_pad_nd(x, {c.padding[kLeft], c.padding[kRight], c.padding[kTop], c.padding[kBottom]});
  }
  auto [dx, dw] = convolution_gradients(grad_output, x, w, {c.stride, padding, c.dilation, s.depthwise ? channels : 1},
                                        want_input, want_weight);
  if (want_input && !symmetric) {
    dx = dx.narrow(2, c.padding[kTop], s.height).narrow(3, c.padding[kLeft], s.width);
  }
  return {dx, dw};
}

// Sum of a * b over all dimensions but that of the input channels.
at::Tensor channel_products(const at::Tensor& a, const at::Tensor& b, int64_t channel_dim) {
  const auto dtype = at::toOpMathType(a.scalar_type());
  const std::array<int64_t, 3> others = {channel_dim == 0 ? 1 : 0, 2, 3};
  return (a.to(dtype) * b.to(dtype)).sum(others);
}

int64_t weight_dim(const SwitchedCall& c) { return c.shape.depthwise ? 0 : 1; }

// What needs no product: empty tensors for gradients that are not wanted, that of the bias, and zeros.
SwitchedGradients plain_gradients(const SwitchedCall& c, const at::Tensor& grad_output, SwitchedMask mask) {
  const auto none = [](const at::Tensor& like) { return at::empty({0}, like.options()); };
  return {mask[kGradInput] ? at::zeros_like(c.input) : none(c.input),
          mask[kGradWeight] ? at::zeros_like(c.weight) : none(c.input),
          mask[kGradBias] ? grad_output.sum({0, 2, 3}) : none(c.input),
          mask[kGradSwitch] ? at::zeros({c.shape.channels_in}, c.switches.options()) : none(c.switches)};
}

SwitchedGradients masked_backward(const SwitchedCall& c, const at::Tensor& grad_output, SwitchedMask mask) {
  SwitchedMask rest = mask;
  if (!c.trivial()) rest = {false, false, mask[kGradBias], false};
  SwitchedGradients result = plain_gradients(c, grad_output, rest);
  if (c.trivial() || !(mask[kGradInput] || mask[kGradWeight] || mask[kGradSwitch])) return result;
  auto& [grad_input, grad_weight, grad_bias, grad_switch] = result;

  const at::Tensor on = c.switches != 0;
  const at::Tensor on_input = on.view({1, -1, 1, 1});
  const at::Tensor on_weight = c.shape.depthwise ? on.view({-1, 1, 1, 1}) : on_input;
  // The switch's gradient follows from either of the others; that of the input knows only channels that are on.
  const bool from_input = mask[kGradInput] && !mask[kGradWeight] && !c.off_gradient;
  const bool want_weight = mask[kGradWeight] || (mask[kGradSwitch] && !from_input);
  const at::Tensor w = mask[kGradInput] ? at::where(on_weight, c.weight, 0) : c.weight;
  auto [dx, dw] = gradients_of(c, grad_output, want_weight ? c.input : at::Tensor(), w, mask[kGradInput], want_weight);
  if (mask[kGradInput]) grad_input = spread(at::where(on_input, dx, 0), c.input, 1, {});
  if (mask[kGradWeight]) grad_weight = spread(at::where(on_weight, dw, 0), c.weight, 1, {});
  if (mask[kGradSwitch]) {
    at::Tensor ds = from_input ? channel_products(c.input, dx, 1) : channel_products(c.weight, dw, weight_dim(c));
    if (!c.off_gradient) ds = at::where(on, ds, 0);
    grad_switch = ds.to(c.switches.scalar_type());
  }
  return result;
}

SwitchedGradients listed_backward(const SwitchedCall& c, const SwitchLists& lists, const at::Tensor& grad_output,
                                  SwitchedMask mask) {
  const int64_t dim = weight_dim(c);
  const int64_t off_count = lists.off.size(0);
  const bool some_on = !c.trivial() && off_count < c.shape.channels_in;
  SwitchedMask rest = mask;
  if (some_on) rest = {false, false, mask[kGradBias], mask[kGradSwitch]};
  SwitchedGradients result = plain_gradients(c, grad_output, rest);
  auto& [grad_input, grad_weight, grad_bias, grad_switch] = result;

  const auto listed_grad_output = [&](const OptionalTensor& list) {
    return c.shape.depthwise ? selected(grad_output, 1, list) : grad_output;
  };
  const auto put = [&](const OptionalTensor& list, const at::Tensor& ds) {
    const at::Tensor values = ds.to(c.switches.scalar_type());
    if (has_value(list)) {
      grad_switch.index_copy_(0, list->to(at::kLong), values);
    } else {
      grad_switch = values;
    }
  };
  if (some_on && (mask[kGradInput] || mask[kGradWeight] || mask[kGradSwitch])) {
    const bool want_weight = mask[kGradWeight] || (mask[kGradSwitch] && !mask[kGradInput]);
    const at::Tensor w = selected(c.weight, dim, lists.on);
    const at::Tensor x = want_weight || mask[kGradSwitch] ? selected(c.input, 1, lists.on) : at::Tensor();
    auto [dx, dw] =
        gradients_of(c, listed_grad_output(lists.on), want_weight ? x : at::Tensor(), w, mask[kGradInput], want_weight);
    if (mask[kGradInput]) grad_input = spread(dx, c.input, 1, lists.on);
    if (mask[kGradWeight]) grad_weight = spread(dw, c.weight, dim, lists.on);
    if (mask[kGradSwitch]) put(lists.on, want_weight ? channel_products(w, dw, dim) : channel_products(x, dx, 1));
  }
  if (mask[kGradSwitch] && c.off_gradient && !c.trivial() && off_count > 0) {
    const at::Tensor w = selected(c.weight, dim, lists.off);
    auto [dx, dw] = gradients_of(c, listed_grad_output(lists.off), selected(c.input, 1, lists.off), w,
                                 /*want_input=*/false, /*want_weight=*/true);
    put(lists.off, channel_products(w, dw, dim));
  }
  return result;
}

}  // namespace

SwitchedGradients aten_switched_conv2d_backward(const SwitchedBackwardCall& call) {
  const SwitchedCall forward = call.forward();
  if (call.lists == nullptr) return masked_backward(forward, call.grad_output, call.mask);
  return listed_backward(forward, *call.lists, call.grad_output, call.mask);
}

}  // namespace bap_kernels
