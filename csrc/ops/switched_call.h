// One checked call of the switched convolution, as it travels from the op to a backend.
#pragma once

#include "ops/conv_call.h"
#include "ops/switched_conv2d.h"

namespace bap_kernels {

struct SwitchedCall {
  const at::Tensor& input;
  const at::Tensor& weight;
  const OptionalTensor& bias;  // null in the backward, which needs no bias
  const at::Tensor& switches;
  c10::IntArrayRef stride, padding, dilation;
  int64_t groups;
  bool off_gradient;
  ConvShape<int64_t> shape;  // kept_in is C_in, kept_out is C_out
  // Only of the backward: which channels of the result anything reads (null: unknown), and who says so; see ops.
  const OptionalTensor* read = nullptr;
  int64_t reader = 0;

  bool symmetric_padding() const { return padding[kTop] == padding[kBottom] && padding[kLeft] == padding[kRight]; }
  at::MemoryFormat format() const { return input.suggest_memory_format(); }
  // No arithmetic is left, whatever the switch says: the result is empty, or only the bias.
  bool trivial() const {
    return shape.batch == 0 || shape.channels_out == 0 || shape.channels_in == 0 || shape.out_h == 0 ||
           shape.out_w == 0;
  }

  // The same convolution as one over the listed channels; depthwise, its result has those channels alone.
  ConvCall on(const OptionalTensor& list) const {
    static const OptionalTensor all;
    const OptionalTensor& out = shape.depthwise ? list : all;
    ConvCall call{input, weight, bias, list, out, stride, padding, dilation, groups, /*cache_packed=*/false, shape};
    if (has_value(list)) call.shape.kept_in = list->size(0);
    if (shape.depthwise) call.shape.kept_out = call.shape.kept_in;
    return call;
  }
};

// Which of the four gradients are computed.
enum SwitchedGradient : int { kGradInput = 0, kGradWeight = 1, kGradBias = 2, kGradSwitch = 3 };
using SwitchedMask = std::array<bool, 4>;
// In the order of SwitchedGradient; those not computed have the shape (0,).
using SwitchedGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

}  // namespace bap_kernels
