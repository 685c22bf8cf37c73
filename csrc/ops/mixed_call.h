// One checked call of the gathered convolution of a mixed batch.
#pragma once

#include <ATen/ops/empty_like.h>

#include <vector>

#include "ops/conv_call.h"
#include "ops/gathered_conv2d_mixed.h"

namespace bap_kernels {

// Samples of one domain, neighbours in the batch.
struct MixedRun {
  at::Tensor input, output;  // parts of the batch; undefined where the CPU kernels find them themselves
  OptionalTensor in_index;
  int64_t first, count;  // which samples of the batch they are
};

struct MixedCall : GatheredConv2dMixedArgs<int64_t> {
  ConvShape<int64_t> shape;  // of the batch
  at::Tensor output;
  std::vector<MixedRun> runs;  // in the order of the batch; none is empty

  // One run as a call of its own.
  ConvCall call(const MixedRun& run) const { return call(run.input, run.in_index, run.count); }

  // `count` samples of `x`, which may hold more, by one list.
  ConvCall call(const at::Tensor& x, const OptionalTensor& list, int64_t count) const {
    ConvCall part{{with_list(list).with_tensors(x, weight, bias), {}, cache_packed}, shape};
    part.shape.batch = count;
    if (has_value(list)) part.shape.kept_in = list->size(0);
    return part;
  }

  // Finds the parts of a run.
  void cut(MixedRun& run) const {
    run.input = input.narrow(0, run.first, run.count);
    run.output = output.narrow(0, run.first, run.count);
  }

  // The same call for another input of its shape, into an output of its own.
  MixedCall with_input(const at::Tensor& x) const {
    MixedCall other{{x, weight, bias, in_indices, counts, stride, padding, dilation, cache_packed},
                    shape,
                    at::empty_like(output),
                    runs};
    for (MixedRun& run : other.runs) other.cut(run);
    return other;
  }
};

}  // namespace bap_kernels
