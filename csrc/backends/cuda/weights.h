// The packed weights of the CUDA kernels.
#pragma once

#include "ops/conv_call.h"

namespace bap_kernels {

// How a kernel reads weights: filter by filter (dispatch/pack_weight.h), or by WGMMA in tiles
// (kernels/weight_tiles.h).
enum class WeightForm { kRows, kTiles };

// That of a call by filters, from the cache where the call asks for that.
at::Tensor packed_weight(const ConvCall& call, WeightForm form);

// Of listed filters and input channels; `by_input`: the columns are input channels, and filters are summed over.
// `used`: how much of the depth is there, on the device; absent: all.
at::Tensor packed_weight(const at::Tensor& weight, const OptionalTensor& filters, const OptionalTensor& channels,
                         bool by_input, WeightForm form, const OptionalTensor& used = {});

}  // namespace bap_kernels
