// Gathered convolution by index_select and at::convolution.
#include "backends/aten/gathered_conv2d.h"

#include <ATen/OpMathType.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include "backends/aten/convolution.h"
#include "backends/aten/folded_weight.h"
#include "backends/aten/fused_convolution.h"
#include "backends/aten/onednn.h"
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

// What the padding adds to the input, where the convolution cannot.
std::array<int64_t, 4> padded_sizes(const ConvCall& c) {
  const auto& s = c.shape;
  if (c.symmetric_padding()) return {s.batch, s.kept_in, s.height, s.width};
  return {s.batch, s.kept_in, s.height + c.padding[kTop] + c.padding[kBottom],
          s.width + c.padding[kLeft] + c.padding[kRight]};
}

int64_t groups_of(const ConvCall& c) { return c.shape.depthwise ? c.shape.kept_in : 1; }

// One call for a device.
struct Run {
  const ConvCall& c;
  c10::DeviceType device;

  Operands operands(WeightForm form) const {
    const bool zero_bias = c.fusion.out_relu && cudnn_fuses(c.input.scalar_type(), groups_of(c), device);
    return operands_of(c, form, 0, zero_bias, device, [](const at::Tensor& w) { return w; });
  }

  at::Tensor convolve(at::Tensor x, const Operands& o, const at::Tensor& residual, Clamp clamp) const {
    const auto padding = pad_unevenly(c, x);
    const ConvolutionOptions options{c.stride, padding, c.dilation, groups_of(c)};
    return convolution(x, o.weight, {o.bias, residual, clamp}, options, device);
  }

  Clamp clamp() const { return {c.fusion.out_relu, c.out_max}; }

  // With the call's epilogue, as much of it as possible in the same call.
  at::Tensor convolve(const at::Tensor& x, const Operands& o) const {
    if (o.scale) return apply_epilogue(convolve(x, o, {}, {}), c);
    const at::Tensor residual = has_value(c.fusion.residual) ? *c.fusion.residual : at::Tensor();
    return convolve(x, o, residual, clamp()).contiguous(c.format());
  }

  // With zeros in the weight of unlisted channels; undefined where they do not make up for what these hold.
  at::Tensor dense() const {
    const Operands o = operands(WeightForm::kZeroed);
    at::Tensor y = convolve(c.input, o, {}, {});
    // Zero times NaN or infinity is NaN: what unlisted channels hold would reach the result. The gather keeps it out.
    // A ReLU could hide it, so it comes after.
    if (!at::isfinite(y.sum(at::toOpMathType(y.scalar_type()))).item<bool>()) return {};
    if (o.scale) return apply_epilogue(y, c);
    return add_clamp(y, has_value(c.fusion.residual) ? *c.fusion.residual : at::Tensor(), clamp(), c.format());
  }

  at::Tensor masked() const {
    // Zero times NaN is NaN, so zeros in the weight alone would not do; to look for NaN would stall the device.
    const at::Tensor x = at::where(channel_mask(c), c.input, at::zeros({}, c.input.options()));
    return convolve(x, operands(WeightForm::kZeroed));
  }

  at::Tensor prologue(const at::Tensor& x, const Operands& o) const {
    return o.prologue ? apply_prologue(x, c.fusion, /*fresh=*/has_value(c.in_index)) : x;
  }

  // By oneDNN with a reordered weight; undefined where it may not have the call.
  at::Tensor packed(const at::Tensor& selected) const {
    const auto size = padded_sizes(c);
    const std::array<int64_t, 2> even = {c.padding[kTop], c.padding[kLeft]}, none = {0, 0};
    const ConvolutionOptions options{c.stride, c.symmetric_padding() ? even : none, c.dilation, groups_of(c)};
    if (convolution_fails(c.input.scalar_type(), c.shape.depthwise ? 1 : c.shape.kept_in,
                          c10::IntArrayRef(size).slice(2), c.weight.sizes().slice(2), options,
                          /*weight_gradient=*/false)) {
      return {};
    }
    const Operands o =
        operands_of(c, WeightForm::kReordered, reordered_variant(c, size, options.padding), /*zero_bias=*/false, device,
                    [&](const at::Tensor& w) { return onednn_reorder(w, options, size); });
    at::Tensor x = prologue(selected, o);
    pad_unevenly(c, x);
    ConvolutionEpilogue epilogue{o.bias, {}, clamp()};
    const at::Tensor residual = has_value(c.fusion.residual) ? *c.fusion.residual : at::Tensor();
    // The result is channels_last: another format costs a pass, which can add as well.
    const bool adds = residual.defined() && residual.is_contiguous(at::MemoryFormat::ChannelsLast) &&
                      onednn_convolves(x.scalar_type(), options.groups, {o.bias, residual, clamp()});
    if (o.scale) {
      epilogue.clamp = {};
    } else if (adds) {
      epilogue.residual = residual;
    } else if (residual.defined()) {
      epilogue.clamp = {};
    }
    const at::Tensor y = onednn_convolution(x, o.weight, epilogue, options);
    if (o.scale) return apply_epilogue(y, c);
    return add_clamp(y, adds ? at::Tensor() : residual, epilogue.clamp.relu ? Clamp{} : clamp(), c.format());
  }
};

}  // namespace

bool dense_applies(const ConvCall& c) {
  return has_value(c.in_index) && !c.shape.depthwise && !c.fusion.has_prologue();
}

at::Tensor aten_gathered_conv2d(const ConvCall& c, Candidate candidate, c10::DeviceType device) {
  const Run run{c, device};
  if (candidate == Candidate::kDense) {
    const at::Tensor y = run.dense();
    if (y.defined()) return y;
    candidate = Candidate::kGather;
  }
  if (candidate == Candidate::kMasked) return run.masked();
  const at::Tensor x = has_value(c.in_index) ? select_channels(c.input, *c.in_index, candidate) : c.input;
  if (candidate == Candidate::kGatherPacked) {
    const at::Tensor y = run.packed(x);
    if (y.defined()) return y;
  }
  const Operands o = run.operands(WeightForm::kSliced);
  return run.convolve(run.prologue(x, o), o);
}

}  // namespace bap_kernels
