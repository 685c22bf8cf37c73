// Schema and Meta kernel of the fused convolution with a second, compact store, and that store by plain operators.
#include "ops/gathered_conv2d_copied.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

namespace bap_kernels {
namespace {

using c10::SymInt;
using c10::SymIntArrayRef;

ResultAndCopy copied_meta(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                          const OptionalTensor& in_index, const OptionalTensor& out_index, SymIntArrayRef stride,
                          SymIntArrayRef padding, SymIntArrayRef dilation, SymInt groups,
                          const OptionalTensor& in_scale, const OptionalTensor& in_shift, bool in_relu,
                          const OptionalTensor& out_scale, const OptionalTensor& out_shift,
                          const OptionalTensor& residual, bool out_relu, const at::Tensor& copy_index, bool,
                          const OptionalTensor& weight_index) {
  const char* op = "_gathered_conv2d_fused_copied";
  const auto s = check_gathered_conv2d_fused<SymInt>(
      op, input, weight, bias, in_index, out_index, stride, padding, dilation, groups,
      {in_scale, in_shift, in_relu, out_scale, out_shift, residual, out_relu}, weight_index);
  check_copy_index(op, copy_index, input);
  const auto empty = [&](const SymInt& channels) {
    const std::array<SymInt, 4> sizes = {s.batch, channels, s.out_h, s.out_w};
    return at::empty_symint(sizes, input.options().memory_format(input.suggest_memory_format()));
  };
  return {empty(s.kept_out), empty(copy_index.sym_size(0))};
}

}  // namespace

at::Tensor select_copy(const at::Tensor& result, const at::Tensor& copy_index, at::MemoryFormat format) {
  if (format != at::MemoryFormat::ChannelsLast) return result.index_select(1, copy_index);
  // index_select would return it without its memory format.
  return result.permute({0, 2, 3, 1}).index_select(3, copy_index).permute({0, 3, 1, 2});
}

TORCH_LIBRARY_FRAGMENT(bap_kernels, m) {
  m.def(
      "_gathered_conv2d_fused_copied(Tensor input, Tensor weight, Tensor? bias, Tensor? in_index, Tensor? out_index, "
      "SymInt[2] stride, SymInt[4] padding, SymInt[2] dilation, SymInt groups, Tensor? in_scale, Tensor? in_shift, "
      "bool in_relu, Tensor? out_scale, Tensor? out_shift, Tensor? residual, bool out_relu, Tensor copy_index, "
      "bool cache_packed=False, Tensor? weight_index=None) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(bap_kernels, Meta, m) { m.impl("_gathered_conv2d_fused_copied", copied_meta); }

}  // namespace bap_kernels
