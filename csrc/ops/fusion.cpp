// See fusion.h. Arithmetic is in float32 for 16-bit dtypes.
#include "ops/fusion.h"

#include <ATen/OpMathType.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/addcmul.h>

namespace bap_kernels {
namespace {

at::Tensor per_channel(const at::Tensor& v, at::ScalarType dtype) { return v.to(dtype).view({1, -1, 1, 1}); }

// In one pass: x, or a new tensor, becomes scale * x + shift.
at::Tensor scale_and_shift(at::Tensor x, const OptionalTensor& scale, const OptionalTensor& shift, bool fresh) {
  const auto dtype = x.scalar_type();
  if (has_value(scale) && has_value(shift)) {
    const at::Tensor factor = per_channel(*scale, dtype), term = per_channel(*shift, dtype);
    return fresh ? at::addcmul_out(x, term, x, factor) : at::addcmul(term, x, factor);
  }
  if (has_value(scale)) return fresh ? x.mul_(per_channel(*scale, dtype)) : x * per_channel(*scale, dtype);
  if (has_value(shift)) return fresh ? x.add_(per_channel(*shift, dtype)) : x + per_channel(*shift, dtype);
  return x;
}

}  // namespace

at::Tensor apply_prologue(at::Tensor x, const Fusion& f, bool fresh) {
  const auto dtype = x.scalar_type(), wide = at::toOpMathType(dtype);
  const bool vectors = has_value(f.in_scale) || has_value(f.in_shift);
  if (vectors) {
    x = scale_and_shift(x.to(wide), f.in_scale, f.in_shift, fresh || wide != dtype);
    fresh = true;
  }
  if (f.in_relu) x = fresh ? x.relu_() : x.relu();
  return x.to(dtype);
}

at::Tensor apply_epilogue(at::Tensor y, const ConvCall& c) {
  const Fusion& f = c.fusion;
  const auto format = c.format();
  if (!f.has_epilogue()) return y.contiguous(format);
  const auto dtype = y.scalar_type();
  y = scale_and_shift(y.to(at::toOpMathType(dtype)), f.out_scale, f.out_shift, /*fresh=*/true);
  if (has_value(f.residual)) y.add_(*f.residual);
  if (c.out_max.has_value()) {
    y.clamp_(0, *c.out_max);
  } else if (f.out_relu) {
    y.relu_();
  }
  return y.to(dtype).contiguous(format);
}

at::Tensor listed_bias(const ConvCall& c) {
  if (!has_value(c.bias)) return {};
  return has_value(c.out_index) ? c.bias->index_select(0, *c.out_index) : *c.bias;
}

at::Tensor trivial_result(const ConvCall& c) {
  at::Tensor y = c.empty_result();
  const at::Tensor bias = listed_bias(c);
  if (bias.defined()) {
    y.copy_(bias.view({1, -1, 1, 1}));
  } else {
    y.zero_();
  }
  return apply_epilogue(y, c);
}

}  // namespace bap_kernels
