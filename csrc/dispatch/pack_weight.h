// The packed weight of the implicit GEMMs of GPU backends: the listed slices with the axis of the sums contiguous.
#pragma once

#include "ops/conv_call.h"

namespace bap_kernels {

// Elements that a packed or compact axis is rounded up to, so that each line starts on 16 bytes and has whole 128-bit
// vectors; the rest is zero.
constexpr int64_t kPackedAlignment = 16;

inline int64_t packed_length(int64_t length) {
  return (length + kPackedAlignment - 1) / kPackedAlignment * kPackedAlignment;
}

// (K_out, taps, K_in rounded up) by filters, (K_in, taps, K_out rounded up) by input channels; `rows` are listed
// filters, `columns` listed input channels.
at::Tensor pack_weight(const at::Tensor& weight, const OptionalTensor& rows, const OptionalTensor& columns,
                       bool by_input);

// That of a call by filters, from the cache where the call asks for that.
at::Tensor packed_by_filter(const ConvCall& call);

}  // namespace bap_kernels
