// See folded_weight.h.
#include "backends/aten/folded_weight.h"

#include <ATen/OpMathType.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/zeros.h>

#include "dispatch/measured_device.h"
#include "dispatch/packed_cache.h"
#include "ops/fusion.h"

namespace bap_kernels {
namespace {

// The largest error that rounding may leave in a filter, as a share of its length: that of numbers of 11 bits, which
// float16 has down to 6e-5. Scaled weights can be smaller, or too large for it.
constexpr double kHalfError = 1. / 1024;

at::Tensor sliced(const ConvCall& c) {
  at::Tensor w = c.weight;
  if (has_value(c.out_index)) w = w.index_select(0, *c.out_index);
  if (has_value(c.weight_list()) && !c.shape.depthwise) w = w.index_select(1, *c.weight_list());
  return w.contiguous(c.format());
}

at::Tensor zeroed(const ConvCall& c) {
  const at::Tensor w = has_value(c.out_index) ? c.weight.index_select(0, *c.out_index) : c.weight;
  at::Tensor all = at::zeros({w.size(0), c.shape.channels_in, w.size(2), w.size(3)}, w.options());
  all.index_copy_(1, c.in_index->to(at::kLong), w.index_select(1, *c.weight_list()));
  return all.contiguous(c.format());
}

// The scaled weight; undefined where its dtype would lose too much of it.
at::Tensor folded(const ConvCall& c, const at::Tensor& w) {
  const auto dtype = w.scalar_type(), wide = at::toOpMathType(dtype);
  at::Tensor product = w.to(wide);
  const auto scale = [&](const OptionalTensor& v, bool filters) {
    product = product * (filters ? v->to(wide).view({-1, 1, 1, 1}) : v->to(wide).view({1, -1, 1, 1}));
  };
  if (has_value(c.fusion.out_scale)) scale(c.fusion.out_scale, true);
  if (c.fusion.only_scales_input()) scale(c.fusion.in_scale, c.shape.depthwise);
  const at::Tensor rounded = product.to(dtype);
  if (dtype == at::kHalf) {
    // To look at the error stalls the stream, which a captured one may not be.
    if (!measured_device(c.input).may_measure()) return {};
    const std::array<int64_t, 3> rest = {1, 2, 3};
    const at::Tensor error = (rounded.to(wide) - product).square().sum(rest);
    const at::Tensor limit = product.square().sum(rest) * (kHalfError * kHalfError);
    if (!(error <= limit).all().item<bool>()) return {};
  }
  return rounded.contiguous(c.format());
}

// The bias at the listed outputs, with what is left to do behind it where `scaled` says that the weight has the scale.
at::Tensor folded_bias(const ConvCall& c, bool zero_bias, bool scaled) {
  const auto dtype = c.input.scalar_type(), wide = at::toOpMathType(dtype);
  at::Tensor bias = listed_bias(c);
  const Fusion& f = c.fusion;
  if (scaled && bias.defined() && has_value(f.out_scale)) bias = bias.to(wide) * f.out_scale->to(wide);
  if ((scaled || !has_value(f.out_scale)) && has_value(f.out_shift)) {
    bias = bias.defined() ? bias.to(wide) + f.out_shift->to(wide) : f.out_shift->to(wide);
  }
  if (bias.defined()) return bias.to(dtype).contiguous();
  return zero_bias ? at::zeros({c.shape.kept_out}, c.input.options().memory_format(std::nullopt)) : bias;
}

PackedKind kind_of(WeightForm form, bool folds) {
  switch (form) {
    case WeightForm::kZeroed:
      return folds ? PackedKind::kZeroedFolded : PackedKind::kZeroed;
    case WeightForm::kReordered:
      return folds ? PackedKind::kReorderedFolded : PackedKind::kReordered;
    default:
      return folds ? PackedKind::kSlicedFolded : PackedKind::kSliced;
  }
}

}  // namespace

Operands operands_of(const ConvCall& c, WeightForm form, int variant, bool zero_bias, c10::DeviceType device,
                     c10::function_ref<at::Tensor(const at::Tensor&)> reorder) {
  const Fusion& f = c.fusion;
  const auto make = [&](bool folds) {
    at::Tensor w = form == WeightForm::kZeroed ? zeroed(c) : sliced(c);
    if (folds) w = folded(c, w);
    return form == WeightForm::kReordered && w.defined() ? reorder(w) : w;
  };
  const auto get = [&](bool folds) {
    const int v = form == WeightForm::kReordered ? variant : static_cast<int>(c.format());
    return PackedCache::instance().get(c, kind_of(form, folds), v, [&] { return make(folds); });
  };

  Operands operands;
  const bool scales = has_value(f.out_scale) || f.only_scales_input();
  if (scales && PackedCache::keeps(c, kind_of(form, true)) && PackedCache::keeps(c, PackedKind::kBiasFolded)) {
    operands.weight = get(true);
  }
  const bool folds = operands.weight.defined();
  operands.prologue = f.has_prologue() && !(folds && f.only_scales_input());
  operands.scale = has_value(f.out_scale) && !folds;
  if (!folds) {
    const bool listed = has_value(c.weight_list()) || has_value(c.out_index);
    operands.weight = listed || form == WeightForm::kReordered ? get(false) : c.weight;
  }

  const auto bias = [&] { return folded_bias(c, zero_bias, folds); };
  const bool computed = has_value(f.out_shift) || (folds && has_value(f.out_scale));
  // A list costs next to nothing on a CPU, and a launch on a GPU, as zeros do.
  const bool launched = device != c10::kCPU && (has_value(c.bias) ? has_value(c.out_index) : zero_bias);
  if (!operands.scale && (computed || launched)) {
    operands.bias = PackedCache::instance().get(c, PackedKind::kBiasFolded, zero_bias ? 1 : 0, bias);
  } else {
    operands.bias = bias();
  }
  return operands;
}

}  // namespace bap_kernels
