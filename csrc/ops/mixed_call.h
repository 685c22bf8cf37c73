// One domain's run of a mixed batch, as a call of its own.
#pragma once

#include "ops/conv_call.h"
#include "ops/gathered_conv2d_mixed.h"

namespace bap_kernels {

struct MixedRun {
  at::Tensor input, output;  // parts of the batch; the call refers to the input
  OptionalTensor in_index;
};

inline ConvCall mixed_run_call(const MixedRun& run, const at::Tensor& weight, const OptionalTensor& bias,
                               c10::IntArrayRef stride, c10::IntArrayRef padding, c10::IntArrayRef dilation,
                               bool cache_packed, ConvShape<int64_t> shape) {
  static const OptionalTensor all;
  shape.batch = run.input.size(0);
  if (has_value(run.in_index)) shape.kept_in = run.in_index->size(0);
  return {run.input, weight, bias, run.in_index, all, stride, padding, dilation, 1, cache_packed, shape};
}

}  // namespace bap_kernels
