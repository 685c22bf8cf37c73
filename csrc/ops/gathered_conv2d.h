// Contract of the gathered convolution: arguments, checks and result shape, device-neutral.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <array>
#include <optional>
#include <tuple>

namespace bap_kernels {

using OptionalTensor = std::optional<at::Tensor>;
// Gradients of input, weight and bias.
using GradientTriple = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

inline bool has_value(const OptionalTensor& t) { return t.has_value() && t->defined(); }

// Padding of the four sides, in input pixels; the op's own order.
enum PaddingSide : int { kTop = 0, kBottom = 1, kLeft = 2, kRight = 3 };

// Geometry of one call. Int is int64_t in kernels and c10::SymInt while tracing.
template <class Int>
struct ConvShape {
  Int batch, channels_in, height, width;
  Int channels_out, kernel_h, kernel_w;
  Int kept_in, kept_out, out_h, out_w;
  bool depthwise;
};

// What is fused around the convolution; every member may be absent.
//   x' = relu?(in_scale * x + in_shift) on the listed channels, zero padding after it
//   y  = relu?(out_scale * (conv(x') + bias) + out_shift + residual)
struct Fusion {
  OptionalTensor in_scale, in_shift;
  bool in_relu = false;
  OptionalTensor out_scale, out_shift, residual;
  bool out_relu = false;

  bool has_prologue() const { return in_relu || has_value(in_scale) || has_value(in_shift); }
  bool has_epilogue() const { return out_relu || has_value(out_scale) || has_value(out_shift) || has_value(residual); }
};

// Raises on any argument that breaks the contract (list values apart: see check_list_values) and returns the geometry.
// With `weight_index` the input's channels have numbers of their own, which `in_index` selects from: the i-th channel
// that is read meets the weight's channel weight_index[i].
template <class Int>
ConvShape<Int> check_gathered_conv2d(const char* op, const at::Tensor& input, const at::Tensor& weight,
                                     const OptionalTensor& bias, const OptionalTensor& in_index,
                                     const OptionalTensor& out_index, c10::ArrayRef<Int> stride,
                                     c10::ArrayRef<Int> padding, c10::ArrayRef<Int> dilation, const Int& groups,
                                     const OptionalTensor& weight_index = {});

// The lists' values: in range and without repeats; for depthwise also equal. Only for CPU tensors: reading a list on a
// GPU would stall its stream, so there the lists are checked when they are made.
void check_list_values(const char* op, const OptionalTensor& in_index, const OptionalTensor& out_index,
                       int64_t channels_in, int64_t channels_out, bool depthwise);

// Likewise for the fused op's `weight_index`.
void check_weight_index_values(const char* op, const OptionalTensor& weight_index, int64_t weight_channels);

// Likewise for the fused op, with what is fused: per-channel vectors of float32 or the input's dtype with one entry for
// each listed channel, and a residual of the result's shape.
template <class Int>
ConvShape<Int> check_gathered_conv2d_fused(const char* op, const at::Tensor& input, const at::Tensor& weight,
                                           const OptionalTensor& bias, const OptionalTensor& in_index,
                                           const OptionalTensor& out_index, c10::ArrayRef<Int> stride,
                                           c10::ArrayRef<Int> padding, c10::ArrayRef<Int> dilation, const Int& groups,
                                           const Fusion& fusion, const OptionalTensor& weight_index);

// The backward's grad_output: the result's shape, the input's dtype and device.
template <class Int>
void check_grad_output(const char* op, const at::Tensor& grad_output, const ConvShape<Int>& shape,
                       const at::Tensor& input);

}  // namespace bap_kernels
