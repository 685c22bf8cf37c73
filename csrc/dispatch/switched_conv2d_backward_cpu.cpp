// Backward of the switched convolution on CPUs: the native kernels or the ATen path.
//   ds[c] = sum over n, h, w of x[n, c, h, w] * dX[n, c, h, w], with dX the input gradient of the unmasked convolution
// The native kernels form dX of all channels chunk by chunk in the cache; what is on goes to dx from there, and all of
// it into the sums, so a gradient of full width is never stored.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include "backends/aten/switched_conv2d.h"
#include "backends/cpu/gradient_call.h"
#include "dispatch/choice.h"
#include "dispatch/named_backend.h"

namespace bap_kernels {
namespace {

// What a switch asks of the input's gradient. Lists and bits live as long as this.
struct SwitchedWish {
  std::vector<uint32_t> keep;
  InputGradient wish{};

  SwitchedWish(const SwitchedCall& c, const SwitchLists& lists, SwitchedMask mask) {
    wish.store = mask[kGradInput];
    wish.dots = mask[kGradSwitch];
    wish.count = c.shape.channels_in;
    if (!has_value(lists.on)) return;
    if (!(wish.dots && c.off_gradient)) {
      wish.channels = list_pointer(lists.on);
      wish.count = lists.on->size(0);
      return;
    }
    keep.assign(wish.count, ~uint32_t{0});
    const int32_t* off = lists.off.const_data_ptr<int32_t>();
    for (int64_t i = 0; i < lists.off.size(0); ++i) keep[off[i]] = 0;
    wish.keep = keep.data();
  }

  at::Tensor switch_gradient(const SwitchedCall& c) const {
    at::Tensor ds = at::zeros({c.shape.channels_in}, c.switches.options());
    auto* out = ds.mutable_data_ptr<float>();
    for (int64_t i = 0; i < wish.count; ++i)
      out[wish.channels ? wish.channels[i] : i] = static_cast<float>(wish.dot[i]);
    return ds;
  }
};

SwitchedGradients native_backward(const SwitchedCall& c, const SwitchLists& lists, const at::Tensor& grad_output,
                                  SwitchedMask mask) {
  const int32_t* on = list_pointer(lists.on);
  GradientCall call{grad_output, c.input, c.weight, c.stride, c.padding, c.dilation, c.shape, on};
  if (on) call.shape.kept_in = lists.on->size(0);
  if (mask[kGradInput] || mask[kGradWeight] || mask[kGradSwitch]) {
    find_live_channels(call, *c.read, c.reader);
  }
  const auto none = [](const at::Tensor& like) { return at::empty({0}, like.options()); };
  SwitchedGradients grads{none(c.input), none(c.input), none(c.input), none(c.switches)};
  if (mask[kGradInput] || mask[kGradSwitch]) {
    SwitchedWish wanted(c, lists, mask);
    run_input_gradient(call, wanted.wish);
    if (mask[kGradInput]) std::get<kGradInput>(grads) = wanted.wish.grad_input;
    if (mask[kGradSwitch]) std::get<kGradSwitch>(grads) = wanted.switch_gradient(c);
  }
  if (mask[kGradWeight]) std::get<kGradWeight>(grads) = native_weight_gradient(call);
  if (mask[kGradBias]) std::get<kGradBias>(grads) = grad_output.sum({0, 2, 3});
  return grads;
}

SwitchedGradients switched_conv2d_backward_cpu(const at::Tensor& grad_output, const at::Tensor& input,
                                               const at::Tensor& weight, const at::Tensor& switches,
                                               c10::IntArrayRef stride, c10::IntArrayRef padding,
                                               c10::IntArrayRef dilation, int64_t groups, bool off_gradient,
                                               SwitchedMask mask, const OptionalTensor& read, int64_t reader) {
  const char* op = "switched_conv2d_backward";
  const OptionalTensor no_bias;
  const SwitchedCall call{
      input,
      weight,
      no_bias,
      switches,
      stride,
      padding,
      dilation,
      groups,
      off_gradient,
      check_switched_conv2d<int64_t>(op, input, weight, no_bias, switches, stride, padding, dilation, groups),
      &read,
      reader};
  check_grad_output<int64_t>(op, grad_output, call.shape, input);
  check_read<int64_t>(op, read, call.shape, input);
  const SwitchLists lists = read_switch(op, switches);
  if (const NamedBackend* named = call.trivial() ? nullptr : named_backend()) {
    return named->switched_backward(call, grad_output, mask);
  }
  const std::string& backend = get_backend();
  // As in the forward, a call that is answered without a convolution is no backend's.
  const bool trivial = call.trivial() || lists.off.size(0) == call.shape.channels_in;
  std::string reason;
  if (backend != "aten") reason = native_gradient_why_not(input, call.shape);
  if (trivial && !reason.empty()) return listed_switched_conv2d_backward(call, lists, grad_output, mask);
  TORCH_CHECK_NOT_IMPLEMENTED(backend != "native" || reason.empty(), op,
                              "(): expected a call that backend `native` can run, got one that it cannot: ", reason,
                              ". Hint: use_backend(\"auto\") takes the ATen path where native cannot run.");
  const auto run = backend == "aten" || !reason.empty() ? listed_switched_conv2d_backward : native_backward;
  return run(call, lists, grad_output, mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(bap_kernels, CPU, m) { m.impl("switched_conv2d_backward", switched_conv2d_backward_cpu); }

}  // namespace bap_kernels
