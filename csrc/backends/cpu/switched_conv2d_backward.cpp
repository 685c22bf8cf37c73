// Backward of the switched convolution on the native kernels.
//   ds[c] = sum over n, h, w of x[n, c, h, w] * dX[n, c, h, w], with dX the input gradient of the unmasked convolution
// They form dX of all channels chunk by chunk in the cache; what is on goes to dx from there, and all of it into the
// sums, so a gradient of full width is never stored.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "backends/cpu/gradient_call.h"
#include "backends/cpu/native.h"

namespace bap_kernels {
namespace {

// What a switch asks of the input's gradient. Lists and bits live as long as this.
struct SwitchedInputGradient {
  std::vector<uint32_t> keep;
  InputGradient gradient{};

  explicit SwitchedInputGradient(const SwitchedBackwardCall& c) {
    const SwitchLists& lists = *c.lists;
    gradient.store = c.mask[kGradInput];
    gradient.dots = c.mask[kGradSwitch];
    gradient.count = c.shape.channels_in;
    if (!has_value(lists.on)) return;
    if (!(gradient.dots && c.off_gradient)) {
      gradient.channels = list_pointer(lists.on);
      gradient.count = lists.on->size(0);
      return;
    }
    keep.assign(gradient.count, ~uint32_t{0});
    const int32_t* off = lists.off.const_data_ptr<int32_t>();
    for (int64_t i = 0; i < lists.off.size(0); ++i) keep[off[i]] = 0;
    gradient.keep = keep.data();
  }

  at::Tensor switch_gradient(const SwitchedBackwardCall& c) const {
    at::Tensor ds = at::zeros({c.shape.channels_in}, c.switches.options());
    auto* out = ds.mutable_data_ptr<float>();
    for (int64_t i = 0; i < gradient.count; ++i)
      out[gradient.channels ? gradient.channels[i] : i] = static_cast<float>(gradient.dot[i]);
    return ds;
  }
};

}  // namespace

SwitchedGradients native_switched_conv2d_backward(const SwitchedBackwardCall& c) {
  const OptionalTensor& list = c.lists->on;
  GradientCall call{c.grad_output, c.input, c.weight, c.stride, c.padding, c.dilation, c.shape, list_pointer(list)};
  if (has_value(list)) call.shape.kept_in = list->size(0);
  const SwitchedMask& mask = c.mask;
  if (mask[kGradInput] || mask[kGradWeight] || mask[kGradSwitch]) find_live_channels(call, c.read, c.reader);
  const auto none = [](const at::Tensor& like) { return at::empty({0}, like.options()); };
  SwitchedGradients grads{none(c.input), none(c.input), none(c.input), none(c.switches)};
  if (mask[kGradInput] || mask[kGradSwitch]) {
    SwitchedInputGradient computed(c);
    run_input_gradient(call, computed.gradient);
    if (mask[kGradInput]) std::get<kGradInput>(grads) = computed.gradient.grad_input;
    if (mask[kGradSwitch]) std::get<kGradSwitch>(grads) = computed.switch_gradient(c);
  }
  if (mask[kGradWeight]) std::get<kGradWeight>(grads) = native_weight_gradient(call);
  if (mask[kGradBias]) std::get<kGradBias>(grads) = c.grad_output.sum({0, 2, 3});
  return grads;
}

}  // namespace bap_kernels
