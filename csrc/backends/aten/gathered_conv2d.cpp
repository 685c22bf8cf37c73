// Gathered convolution by index_select and at::convolution.
#include "backends/aten/gathered_conv2d.h"

#include <ATen/OpMathType.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include "backends/aten/convolution.h"
#include "backends/aten/packed_convolution.h"
#include "backends/aten/pixel_gather.h"
#include "dispatch/packed_cache.h"
#include "ops/fusion.h"

namespace bap_kernels {
namespace {

at::Tensor select_channels(const at::Tensor& x, const at::Tensor& index, Candidate candidate) {
  if (x.suggest_memory_format() != at::MemoryFormat::ChannelsLast) return x.index_select(1, index);
  if (candidate == Candidate::kGatherPacked && gather_pixels_applies(x)) return gather_pixels(x, index);
  const at::Tensor pixels = x.permute({0, 2, 3, 1});  // index_select would return it without its memory format
  if (candidate == Candidate::kGatherFlat && pixels.is_contiguous()) {
    const auto n = pixels.size(0), h = pixels.size(1), w = pixels.size(2);
    return pixels.view({n * h * w, -1}).index_select(1, index).view({n, h, w, -1}).permute({0, 3, 1, 2});
  }
  return pixels.index_select(3, index).permute({0, 3, 1, 2});
}

// The listed slices of the weight, in the call's format.
at::Tensor slice_weight(const ConvCall& c) {
  at::Tensor w = c.weight;
  if (has_value(c.out_index)) w = w.index_select(0, *c.out_index);
  if (has_value(c.weight_list()) && !c.shape.depthwise) w = w.index_select(1, *c.weight_list());
  return w.contiguous(c.format());
}

at::Tensor listed_weight(const ConvCall& c) {
  if (!has_value(c.weight_list()) && !has_value(c.out_index)) return c.weight;
  return PackedCache::instance().get(c, PackedKind::kSliced, static_cast<int>(c.format()),
                                     [&] { return slice_weight(c); });
}

// The listed filters over all input channels, zeros where the input is not listed.
at::Tensor zeroed_weight(const ConvCall& c) {
  const auto make = [&] {
    at::Tensor w = has_value(c.out_index) ? c.weight.index_select(0, *c.out_index) : c.weight;
    at::Tensor zeroed = at::zeros({w.size(0), c.shape.channels_in, w.size(2), w.size(3)}, w.options());
    zeroed.index_copy_(1, c.in_index->to(at::kLong), w.index_select(1, *c.weight_list()));
    return zeroed.contiguous(c.format());
  };
  return PackedCache::instance().get(c, PackedKind::kZeroed, static_cast<int>(c.format()), make);
}

// Whether each of the input's channels is listed, (1, C_in, 1, 1).
at::Tensor channel_mask(const ConvCall& c) {
  return PackedCache::instance().get(c, PackedKind::kMask, 0, [&] {
    const at::Tensor mask = at::zeros({1, c.shape.channels_in, 1, 1}, c.input.options().dtype(at::kBool));
    return mask.index_fill_(1, c.in_index->to(at::kLong), true);
  });
}

// The padding that is left for the convolution; what it cannot do is added to `x`.
std::array<int64_t, 2> pad_unevenly(const ConvCall& c, at::Tensor& x) {
  if (c.symmetric_padding()) return {c.padding[kTop], c.padding[kLeft]};
  x = at::constant_pad_nd(x, {c.padding[kLeft], c.padding[kRight], c.padding[kTop], c.padding[kBottom]});
  return {0, 0};
}

// Whether oneDNN may not have the call, which kGatherPacked would hand to it.
bool packed_fails(const ConvCall& c, const at::Tensor& x, c10::IntArrayRef padding) {
  return convolution_fails(x.scalar_type(), c.shape.depthwise ? 1 : c.shape.kept_in, x.sizes().slice(2),
                           c.weight.sizes().slice(2), {c.stride, padding, c.dilation, 1}, /*weight_gradient=*/false);
}

at::Tensor convolve(const ConvCall& c, at::Tensor x, const at::Tensor& w) {
  const auto padding = pad_unevenly(c, x);
  const at::Tensor bias = listed_bias(c);
  return convolution(x, w, bias.defined() ? OptionalTensor(bias) : std::nullopt,
                     {c.stride, padding, c.dilation, c.shape.depthwise ? c.shape.kept_in : 1});
}

}  // namespace

bool dense_applies(const ConvCall& c) {
  return has_value(c.in_index) && !c.shape.depthwise && !c.fusion.has_prologue();
}

at::Tensor aten_gathered_conv2d(const ConvCall& c, Candidate candidate) {
  if (candidate == Candidate::kDense) {
    const at::Tensor dense = convolve(c, c.input, zeroed_weight(c));
    // Zero times NaN or infinity is NaN: what unlisted channels hold would reach the result. The gather keeps it out.
    if (at::isfinite(dense.sum(at::toOpMathType(dense.scalar_type()))).item<bool>()) {
      return apply_epilogue(dense, c.fusion).contiguous(c.format());
    }
    candidate = Candidate::kGather;
  }
  if (candidate == Candidate::kMasked) {
    // Zero times NaN is NaN, so zeros in the weight alone would not do; to look for NaN would stall the device.
    const at::Tensor x = at::where(channel_mask(c), c.input, at::zeros({}, c.input.options()));
    return apply_epilogue(convolve(c, x, zeroed_weight(c)), c.fusion).contiguous(c.format());
  }
  at::Tensor x = has_value(c.in_index) ? select_channels(c.input, *c.in_index, candidate) : c.input;
  if (c.fusion.has_prologue()) x = apply_prologue(x, c.fusion);
  at::Tensor y;
  if (candidate == Candidate::kGatherPacked) {
    at::Tensor padded = x;
    const auto padding = pad_unevenly(c, padded);
    if (!packed_fails(c, padded, padding)) {
      y = packed_convolution(c, padded, padding, listed_bias(c), [&] { return slice_weight(c); });
    }
  }
  if (!y.defined()) y = convolve(c, x, listed_weight(c));
  return apply_epilogue(y, c.fusion).contiguous(c.format());
}

}  // namespace bap_kernels
