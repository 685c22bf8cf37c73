// Contract of the gathered convolution of a batch whose samples belong to several domains.
//   y[n] = gathered_conv2d(x[n], w, b, in_indices[d])    for the samples n of the d-th run of the batch
#pragma once

#include "ops/gathered_conv2d.h"

namespace bap_kernels {

template <class Int>
struct GatheredConv2dMixedArgs {
  const at::Tensor& input;
  const at::Tensor& weight;
  const OptionalTensor& bias;
  const OptionalTensorList& in_indices;  // one list for each run
  c10::IntArrayRef counts;               // samples of each run
  c10::ArrayRef<Int> stride, padding, dilation;
  bool cache_packed;

  auto tie() const {
    return std::tie(input, weight, bias, in_indices, counts, stride, padding, dilation, cache_packed);
  }
  GatheredConv2dMixedArgs with_lists(const OptionalTensorList& lists) const {
    return {input, weight, bias, lists, counts, stride, padding, dilation, cache_packed};
  }
  // The convolution of the whole batch by one list.
  ConvArgs<Int> with_list(const OptionalTensor& in_index) const {
    return {input, weight, bias, in_index, kAbsent, stride, padding, dilation, Int(1)};
  }
};

// For inference: it has no gradient.
struct GatheredConv2dMixed {
  static constexpr const char* kName = "_gathered_conv2d_mixed";
  static constexpr const char* kSchema =
      "(Tensor input, Tensor weight, Tensor? bias, Tensor?[] in_indices, int[] counts, SymInt[2] stride, "
      "SymInt[4] padding, SymInt[2] dilation, bool cache_packed=False) -> Tensor";
  using Result = at::Tensor;
  template <class Int>
  using Args = GatheredConv2dMixedArgs<Int>;
};

// Raises unless there is one list for each run, the runs make up the batch, and each list fits.
template <class Int>
ConvShape<Int> check_gathered_conv2d_mixed(const char* op, const GatheredConv2dMixedArgs<Int>& args);

}  // namespace bap_kernels
