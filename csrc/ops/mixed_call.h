// One checked call of the gathered convolution of a mixed batch.
#pragma once

#include <ATen/ops/empty_like.h>

#include <vector>

#include "ops/conv_call.h"
#include "ops/gathered_conv2d_mixed.h"

namespace bap_kernels {

// The samples of one domain, neighbours in the batch.
struct MixedRun {
  at::Tensor input, output;  // parts of the batch
  OptionalTensor in_index;
};

struct MixedCall : GatheredConv2dMixedArgs<int64_t> {
  ConvShape<int64_t> shape;  // of the batch
  at::Tensor output;
  std::vector<MixedRun> runs;  // in the order of the batch; none is empty

  // One run as a call of its own.
  ConvCall call(const MixedRun& run) const {
    ConvCall part{{with_list(run.in_index).with_tensors(run.input, weight, bias), {}, cache_packed}, shape};
    part.shape.batch = run.input.size(0);
    if (has_value(run.in_index)) part.shape.kept_in = run.in_index->size(0);
    return part;
  }

  // The same call for another input of its shape, into an output of its own.
  MixedCall with_input(const at::Tensor& x) const {
    MixedCall other{{x, weight, bias, in_indices, counts, stride, padding, dilation, cache_packed},
                    shape,
                    at::empty_like(output),
                    {}};
    int64_t first = 0;
    for (const MixedRun& run : runs) {
      const int64_t count = run.input.size(0);
      other.runs.push_back({x.narrow(0, first, count), other.output.narrow(0, first, count), run.in_index});
      first += count;
    }
    return other;
  }
};

}  // namespace bap_kernels
