// Lists of channels: their check; listed channels taken out of a tensor, and put back.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>

#include "ops/op.h"

namespace bap_kernels {

// Raises on a list that is not int32, 1-D and on the input's device; see check_list_values for its values.
void check_list(const char* op, const char* name, const OptionalTensor& list, const at::Tensor& input);

// Whether two lists on the CPU name the same channels in the same order.
bool same_list(const OptionalTensor& a, const OptionalTensor& b);

inline at::Tensor selected(const at::Tensor& t, int64_t dim, const OptionalTensor& index) {
  return has_value(index) ? t.index_select(dim, *index) : t;
}

// `part` put back at the listed places of `whole`'s shape, zeros elsewhere; in the strides of empty_like(whole).
inline at::Tensor spread(const at::Tensor& part, const at::Tensor& whole, int64_t dim, const OptionalTensor& index) {
  if (has_value(index)) return at::zeros_like(whole).index_copy_(dim, index->to(at::kLong), part);
  at::Tensor like = at::empty_like(whole);
  return like.strides() == part.strides() ? part : like.copy_(part);
}

// Gradient (C_out,) of the bias: the sum of grad_output over images and pixels at the listed filters, zeros elsewhere.
inline at::Tensor listed_bias_gradient(const at::Tensor& grad_output, const OptionalTensor& out_index,
                                       int64_t channels_out) {
  const at::Tensor sums = grad_output.sum({0, 2, 3});
  return spread(sums, at::empty({channels_out}, sums.options()), 0, out_index);
}

}  // namespace bap_kernels
