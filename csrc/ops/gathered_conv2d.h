// Contract of the gathered convolution: its ops, their arguments, their checks and the shape of their results,
// device-neutral.
//   y = conv2d(x[:, in_index], w[out_index, in_index], b[out_index])
#pragma once

#include <array>

#include "ops/op.h"

namespace bap_kernels {

// Gradients of input, weight and bias.
using GradientTriple = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using GradientMask = std::array<bool, 3>;
// A result, and its second, compact store; undefined where none is asked for.
using DualResult = std::tuple<at::Tensor, at::Tensor>;

// Padding of the four sides, in input pixels; the op's own order.
enum PaddingSide : int { kTop = 0, kBottom = 1, kLeft = 2, kRight = 3 };

// What every gathered convolution takes.
template <class Int>
struct ConvArgs {
  const at::Tensor& input;          // (N, C_in, H, W)
  const at::Tensor& weight;         // (C_out, C_in / groups, kH, kW), full size
  const OptionalTensor& bias;       // (C_out,), full size
  const OptionalTensor& in_index;   // int32, the channels that are read; absent: all
  const OptionalTensor& out_index;  // int32, the channels that are written; absent: all
  c10::ArrayRef<Int> stride;        // rows, columns
  c10::ArrayRef<Int> padding;       // of the four sides
  c10::ArrayRef<Int> dilation;      // rows, columns
  Int groups;

  auto tie() const { return std::tie(input, weight, bias, in_index, out_index, stride, padding, dilation, groups); }
  // The same arguments with others in some places.
  ConvArgs with_lists(const OptionalTensor& in, const OptionalTensor& out) const {
    return {input, weight, bias, in, out, stride, padding, dilation, groups};
  }
  ConvArgs with_tensors(const at::Tensor& x, const at::Tensor& w, const OptionalTensor& b) const {
    return {x, w, b, in_index, out_index, stride, padding, dilation, groups};
  }
};

template <class Int>
struct GatheredConv2dArgs : ConvArgs<Int> {
  bool cache_packed;  // packed forms of the weight may be kept between calls

  auto tie() const { return std::tuple_cat(ConvArgs<Int>::tie(), std::tie(cache_packed)); }
};

struct GatheredConv2d {
  static constexpr const char* kName = "gathered_conv2d";
  static constexpr const char* kSchema =
      "(Tensor input, Tensor weight, Tensor? bias, Tensor? in_index, Tensor? out_index, SymInt[2] stride, "
      "SymInt[4] padding, SymInt[2] dilation, SymInt groups, bool cache_packed=False) -> Tensor";
  using Result = at::Tensor;
  template <class Int>
  using Args = GatheredConv2dArgs<Int>;
};

template <class Int>
struct GatheredConv2dBackwardArgs {
  const at::Tensor& grad_output;  // (N, K_out, oH, oW)
  const at::Tensor& input;
  const at::Tensor& weight;
  const OptionalTensor& in_index;
  const OptionalTensor& out_index;
  c10::ArrayRef<Int> stride, padding, dilation;
  Int groups;
  GradientMask mask;  // which gradients are computed

  auto tie() const {
    return std::tie(grad_output, input, weight, in_index, out_index, stride, padding, dilation, groups, mask);
  }
  GatheredConv2dBackwardArgs with_lists(const OptionalTensor& in, const OptionalTensor& out) const {
    return {grad_output, input, weight, in, out, stride, padding, dilation, groups, mask};
  }
  ConvArgs<Int> forward() const {
    return {input, weight, kAbsent, in_index, out_index, stride, padding, dilation, groups};
  }
};

struct GatheredConv2dBackward {
  static constexpr const char* kName = "gathered_conv2d_backward";
  static constexpr const char* kSchema =
      "(Tensor grad_output, Tensor input, Tensor weight, Tensor? in_index, Tensor? out_index, SymInt[2] stride, "
      "SymInt[4] padding, SymInt[2] dilation, SymInt groups, bool[3] output_mask) -> (Tensor, Tensor, Tensor)";
  using Result = GradientTriple;  // an empty tensor for each gradient that is not computed
  template <class Int>
  using Args = GatheredConv2dBackwardArgs<Int>;
};

// What is fused around the convolution; every member may be absent.
//   x' = relu?(in_scale * x + in_shift) on the listed channels, zero padding after it
//   y  = relu?(out_scale * (conv(x') + bias) + out_shift + residual)
// and at most `out_max` of GatheredConv2dFusedArgs.
struct Fusion {
  const OptionalTensor& in_scale = kAbsent;
  const OptionalTensor& in_shift = kAbsent;
  bool in_relu = false;
  const OptionalTensor& out_scale = kAbsent;
  const OptionalTensor& out_shift = kAbsent;
  const OptionalTensor& residual = kAbsent;
  bool out_relu = false;

  auto tie() const { return std::tie(in_scale, in_shift, in_relu, out_scale, out_shift, residual, out_relu); }
  bool has_prologue() const { return in_relu || has_value(in_scale) || has_value(in_shift); }
  // Whether the prologue is a scale alone, which the weight can take in: the padding stays zero.
  bool only_scales_input() const { return has_value(in_scale) && !has_value(in_shift) && !in_relu; }
  bool has_epilogue() const { return out_relu || has_value(out_scale) || has_value(out_shift) || has_value(residual); }
};

template <class Int>
struct GatheredConv2dFusedArgs : ConvArgs<Int> {
  Fusion fusion = {};
  bool cache_packed = false;
  // Where the input holds only some of the weight's channels, and in_index selects from those: the weight's channel for
  // each one that is read.
  const OptionalTensor& weight_index = kAbsent;
  // Channels of the result that are stored a second time, compactly, for a consumer of their own; by their places in
  // it.
  //   second = y.index_select(1, dual_store_index)     bit for bit, in the memory format of y
  const OptionalTensor& dual_store_index = kAbsent;
  // The largest result, as 6 of ReLU6; only with `out_relu`.
  std::optional<double> out_max = std::nullopt;

  auto tie() const {
    return std::tuple_cat(ConvArgs<Int>::tie(), fusion.tie(),
                          std::tie(cache_packed, weight_index, dual_store_index, out_max));
  }
};

// For inference: it has no gradient.
struct GatheredConv2dFused {
  static constexpr const char* kName = "_gathered_conv2d_fused";
  static constexpr const char* kSchema =
      "(Tensor input, Tensor weight, Tensor? bias, Tensor? in_index, Tensor? out_index, SymInt[2] stride, "
      "SymInt[4] padding, SymInt[2] dilation, SymInt groups, Tensor? in_scale, Tensor? in_shift, bool in_relu, "
      "Tensor? out_scale, Tensor? out_shift, Tensor? residual, bool out_relu, bool cache_packed=False, "
      "Tensor? weight_index=None, Tensor? dual_store_index=None, float? out_max=None) -> (Tensor, Tensor)";
  using Result = DualResult;
  template <class Int>
  using Args = GatheredConv2dFusedArgs<Int>;
};

// Geometry of one call. Int is int64_t in kernels and c10::SymInt while tracing.
template <class Int>
struct ConvShape {
  Int batch, channels_in, height, width;
  Int channels_out, kernel_h, kernel_w;
  Int kept_in, kept_out, out_h, out_w;
  bool depthwise;

  // No arithmetic is left: the result is empty, or only the bias and what is fused.
  bool trivial() const { return batch == 0 || kept_out == 0 || kept_in == 0 || out_h == 0 || out_w == 0; }
};

// The checks raise on any argument that breaks the contract (values of lists apart: see check_list_values) and return
// the geometry.
template <class Int>
ConvShape<Int> check_conv(const char* op, const ConvArgs<Int>& args, const OptionalTensor& weight_index = kAbsent);

// The backward's grad_output: the result's shape, the input's dtype and device.
template <class Int>
void check_grad_output(const char* op, const at::Tensor& grad_output, const ConvShape<Int>& shape,
                       const at::Tensor& input);

template <class Int>
ConvShape<Int> check_gathered_conv2d_backward(const char* op, const GatheredConv2dBackwardArgs<Int>& args) {
  const auto shape = check_conv<Int>(op, args.forward());
  check_grad_output<Int>(op, args.grad_output, shape, args.input);
  return shape;
}

// Likewise with what is fused: per-channel vectors of float32 or the input's dtype with one entry for each listed
// channel, and a residual of the result's shape.
template <class Int>
ConvShape<Int> check_gathered_conv2d_fused(const char* op, const GatheredConv2dFusedArgs<Int>& args);

// The lists' values: in range and without repeats; for depthwise also equal. Only for CPU tensors: reading a list on a
// GPU would stall its stream, so there the lists are checked when they are made.
void check_list_values(const char* op, const OptionalTensor& in_index, const OptionalTensor& out_index,
                       int64_t channels_in, int64_t channels_out, bool depthwise);
// Likewise of one list, in the range of `channels`.
void check_list_values(const char* op, const char* name, const OptionalTensor& list, int64_t channels);

}  // namespace bap_kernels
