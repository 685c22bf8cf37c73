// One checked call of the gathered convolution, as it travels from the op to a backend.
#pragma once

#include "ops/gathered_conv2d.h"

namespace bap_kernels {

struct ConvCall {
  const at::Tensor& input;
  const at::Tensor& weight;
  const OptionalTensor& bias;
  const OptionalTensor& in_index;
  const OptionalTensor& out_index;
  c10::IntArrayRef stride, padding, dilation;
  int64_t groups;
  bool cache_packed;
  ConvShape<int64_t> shape;
  Fusion fusion = {};
  // Where the input holds only some of the weight's channels: the weight's channel for each one that is read.
  OptionalTensor weight_index = {};
  // A second, compact store: the result's channels at these positions. A backend may fill `*copy` in the launch that
  // writes the result, in the same memory format; where it leaves it undefined, the op selects them afterwards.
  OptionalTensor copy_index = {};
  at::Tensor* copy = nullptr;

  // The weight's channels that are read, in order; absent: all.
  const OptionalTensor& weight_list() const { return has_value(weight_index) ? weight_index : in_index; }

  bool symmetric_padding() const { return padding[kTop] == padding[kBottom] && padding[kLeft] == padding[kRight]; }
  int64_t taps() const { return shape.kernel_h * shape.kernel_w; }
  at::MemoryFormat format() const { return input.suggest_memory_format(); }
  // No arithmetic is left: the result is empty, or only the bias and what is fused.
  bool trivial() const {
    return shape.batch == 0 || shape.kept_out == 0 || shape.kept_in == 0 || shape.out_h == 0 || shape.out_w == 0;
  }
};

}  // namespace bap_kernels
