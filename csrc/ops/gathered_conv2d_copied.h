// Contract of the fused convolution that stores some channels of its result a second time, compactly, for a reader of
// its own.
//   copy = y.index_select(1, copy_index)     bit for bit, in the memory format of y
#pragma once

#include "ops/gathered_conv2d.h"

namespace bap_kernels {

using ResultAndCopy = std::tuple<at::Tensor, at::Tensor>;

// The positions of the copy's channels: an int32 list, in any order, each at most once.
void check_copy_index(const char* op, const at::Tensor& copy_index, const at::Tensor& input);

// That they lie among the `kept_out` written channels; like check_list_values, on CPUs only.
void check_copy_index_values(const char* op, const at::Tensor& copy_index, int64_t kept_out);

// The copy made of a finished result, which is dense in `format`.
at::Tensor select_copy(const at::Tensor& result, const at::Tensor& copy_index, at::MemoryFormat format);

}  // namespace bap_kernels
