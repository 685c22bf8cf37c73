// Schema, checks and Meta kernel of the gathered convolution of mixed batches.
#include "ops/gathered_conv2d_mixed.h"

#include <ATen/ops/empty.h>
#include <c10/util/irange.h>

namespace bap_kernels {

using c10::SymInt;

template <class Int>
ConvShape<Int> check_gathered_conv2d_mixed(const char* op, const GatheredConv2dMixedArgs<Int>& a) {
  TORCH_CHECK_VALUE(a.counts.size() == a.in_indices.size(), op,
                    "(): expected `counts` to have one entry for each of the ", a.in_indices.size(),
                    " lists of `in_indices`, got ", a.counts.size(), ".");
  auto shape = check_conv<Int>(op, a.with_list(kAbsent));
  int64_t total = 0;
  for (const auto i : c10::irange(a.counts.size())) {
    TORCH_CHECK_VALUE(a.counts[i] >= 0, op, "(): expected `counts` to be at least 0, got ", a.counts, ".");
    total += a.counts[i];
    check_conv<Int>(op, a.with_list(a.in_indices.get(i)));
  }
  TORCH_CHECK_VALUE(shape.batch == total, op, "(): expected `counts` to add up to the batch of ", shape.batch, ", got ",
                    total, ".");
  return shape;
}

template ConvShape<int64_t> check_gathered_conv2d_mixed(const char*, const GatheredConv2dMixedArgs<int64_t>&);
template ConvShape<SymInt> check_gathered_conv2d_mixed(const char*, const GatheredConv2dMixedArgs<SymInt>&);

namespace {

at::Tensor mixed_meta(const GatheredConv2dMixedArgs<SymInt>& a) {
  const auto s = check_gathered_conv2d_mixed<SymInt>(GatheredConv2dMixed::kName, a);
  const std::array<SymInt, 4> sizes = {s.batch, s.channels_out, s.out_h, s.out_w};
  return at::empty_symint(sizes, a.input.options().memory_format(a.input.suggest_memory_format()));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(bap_kernels, m) { define<GatheredConv2dMixed>(m); }

TORCH_LIBRARY_IMPL(bap_kernels, Meta, m) { implement<GatheredConv2dMixed, mixed_meta>(m); }

}  // namespace bap_kernels
