// Schema, checks and Meta kernel of the gathered convolution of mixed batches.
#include "ops/gathered_conv2d_mixed.h"

#include <ATen/ops/empty.h>
#include <c10/util/irange.h>
#include <torch/library.h>

#include <numeric>

namespace bap_kernels {
namespace {

using c10::SymInt;
using c10::SymIntArrayRef;

at::Tensor mixed_meta(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                      const OptionalTensorList& in_indices, c10::IntArrayRef counts, SymIntArrayRef stride,
                      SymIntArrayRef padding, SymIntArrayRef dilation, bool) {
  const auto s = check_gathered_conv2d_mixed<SymInt>("_gathered_conv2d_mixed", input, weight, bias, in_indices, counts,
                                                     stride, padding, dilation);
  const std::array<SymInt, 4> sizes = {s.batch, s.channels_out, s.out_h, s.out_w};
  return at::empty_symint(sizes, input.options().memory_format(input.suggest_memory_format()));
}

}  // namespace

template <class Int>
ConvShape<Int> check_gathered_conv2d_mixed(const char* op, const at::Tensor& input, const at::Tensor& weight,
                                           const OptionalTensor& bias, const OptionalTensorList& in_indices,
                                           c10::IntArrayRef counts, c10::ArrayRef<Int> stride,
                                           c10::ArrayRef<Int> padding, c10::ArrayRef<Int> dilation) {
  TORCH_CHECK_VALUE(counts.size() == in_indices.size(), op, "(): expected `counts` to have one entry for each of the ",
                    in_indices.size(), " lists of `in_indices`, got ", counts.size(), ".");
  auto shape = check_gathered_conv2d<Int>(op, input, weight, bias, {}, {}, stride, padding, dilation, Int(1));
  int64_t total = 0;
  for (const auto i : c10::irange(counts.size())) {
    TORCH_CHECK_VALUE(counts[i] >= 0, op, "(): expected `counts` to be at least 0, got ", counts, ".");
    total += counts[i];
    check_gathered_conv2d<Int>(op, input, weight, bias, in_indices.get(i), {}, stride, padding, dilation, Int(1));
  }
  TORCH_CHECK_VALUE(shape.batch == total, op, "(): expected `counts` to add up to the batch of ", shape.batch, ", got ",
                    total, ".");
  return shape;
}

template ConvShape<int64_t> check_gathered_conv2d_mixed<int64_t>(const char*, const at::Tensor&, const at::Tensor&,
                                                                 const OptionalTensor&, const OptionalTensorList&,
                                                                 c10::IntArrayRef, c10::IntArrayRef, c10::IntArrayRef,
                                                                 c10::IntArrayRef);
template ConvShape<SymInt> check_gathered_conv2d_mixed<SymInt>(const char*, const at::Tensor&, const at::Tensor&,
                                                               const OptionalTensor&, const OptionalTensorList&,
                                                               c10::IntArrayRef, SymIntArrayRef, SymIntArrayRef,
                                                               SymIntArrayRef);

TORCH_LIBRARY_FRAGMENT(bap_kernels, m) {
  m.def(
      "_gathered_conv2d_mixed(Tensor input, Tensor weight, Tensor? bias, Tensor?[] in_indices, int[] counts, "
      "SymInt[2] stride, SymInt[4] padding, SymInt[2] dilation, bool cache_packed=False) -> Tensor");
}

TORCH_LIBRARY_IMPL(bap_kernels, Meta, m) { m.impl("_gathered_conv2d_mixed", mixed_meta); }

}  // namespace bap_kernels
