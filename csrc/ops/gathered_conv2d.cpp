// Schemas of the gathered convolution's ops and their Meta kernels (shapes, dtypes and strides without data).
#include "ops/gathered_conv2d.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

namespace bap_kernels {
namespace {

using c10::SymInt;

at::Tensor empty_result(const ConvShape<SymInt>& s, const SymInt& channels, const at::Tensor& input) {
  const std::array<SymInt, 4> sizes = {s.batch, channels, s.out_h, s.out_w};
  return at::empty_symint(sizes, input.options().memory_format(input.suggest_memory_format()));
}

at::Tensor forward_meta(const GatheredConv2dArgs<SymInt>& a) {
  const auto s = check_conv<SymInt>(GatheredConv2d::kName, a);
  return empty_result(s, s.kept_out, a.input);
}

GradientTriple backward_meta(const GatheredConv2dBackwardArgs<SymInt>& a) {
  check_gathered_conv2d_backward<SymInt>(GatheredConv2dBackward::kName, a);
  const auto none = [&] { return at::empty({0}, a.input.options().memory_format(std::nullopt)); };
  return {
      a.mask[0] ? at::empty_like(a.input) : none(), a.mask[1] ? at::empty_like(a.weight) : none(),
      a.mask[2] ? at::empty_symint({a.weight.sym_size(0)}, a.weight.options().memory_format(std::nullopt)) : none()};
}

DualResult fused_meta(const GatheredConv2dFusedArgs<SymInt>& a) {
  const auto s = check_gathered_conv2d_fused<SymInt>(GatheredConv2dFused::kName, a);
  const bool dual = has_value(a.dual_store_index);
  return {empty_result(s, s.kept_out, a.input),
          dual ? empty_result(s, a.dual_store_index->sym_size(0), a.input) : at::Tensor()};
}

}  // namespace

TORCH_LIBRARY(bap_kernels, m) {
  define<GatheredConv2d>(m);
  define<GatheredConv2dBackward>(m);
  define<GatheredConv2dFused>(m);
}

TORCH_LIBRARY_IMPL(bap_kernels, Meta, m) {
  implement<GatheredConv2d, forward_meta>(m);
  implement<GatheredConv2dBackward, backward_meta>(m);
  implement<GatheredConv2dFused, fused_meta>(m);
}

}  // namespace bap_kernels
