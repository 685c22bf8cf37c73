// One checked call of the switched convolution, as it travels from dispatch to a backend.
#pragma once

#include "ops/conv_call.h"
#include "ops/switched_conv2d.h"

namespace bap_kernels {

struct SwitchedCall : SwitchedConv2dArgs<int64_t> {
  ConvShape<int64_t> shape;            // kept_in is C_in, kept_out is C_out
  const SwitchLists* lists = nullptr;  // what the switch says, where the host has read it

  bool symmetric_padding() const { return padding[kTop] == padding[kBottom] && padding[kLeft] == padding[kRight]; }
  at::MemoryFormat format() const { return input.suggest_memory_format(); }
  // No arithmetic is left, whatever the switch says: the result is empty, or only the bias.
  bool trivial() const { return shape.trivial(); }

  // The same convolution as one over the listed channels; depthwise, its result has those channels alone.
  ConvCall on(const OptionalTensor& list) const {
    ConvCall call{{conv(list, shape.depthwise ? list : kAbsent)}, shape};
    if (has_value(list)) call.shape.kept_in = list->size(0);
    if (shape.depthwise) call.shape.kept_out = call.shape.kept_in;
    return call;
  }
  SwitchedCall with_input(const at::Tensor& x) const { return {with_tensors(x, weight, bias), shape, lists}; }
};

// One checked call of its backward.
struct SwitchedBackwardCall : SwitchedConv2dBackwardArgs<int64_t> {
  ConvShape<int64_t> shape;
  const SwitchLists* lists = nullptr;

  SwitchedBackwardCall with_input(const at::Tensor& x) const {
    return {{grad_output, x, weight, switches, stride, padding, dilation, groups, off_gradient, mask, read, reader},
            shape,
            lists};
  }
  SwitchedCall forward() const { return {SwitchedConv2dBackwardArgs<int64_t>::forward(), shape, lists}; }
};

}  // namespace bap_kernels
