// One checked call of the gathered convolution of a mixed batch.
#pragma once

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
};

}  // namespace bap_kernels
