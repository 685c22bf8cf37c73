// Contract of the gathered convolution of a batch whose samples belong to several domains.
//   y[n] = gathered_conv2d(x[n], w, b, in_indices[d])    for the samples n of the d-th run of the batch
#pragma once

#include "ops/gathered_conv2d.h"

namespace bap_kernels {

using OptionalTensorList = c10::List<std::optional<at::Tensor>>;

// Raises unless there is one list for each run, the runs make up the batch, and each list fits.
template <class Int>
ConvShape<Int> check_gathered_conv2d_mixed(const char* op, const at::Tensor& input, const at::Tensor& weight,
                                           const OptionalTensor& bias, const OptionalTensorList& in_indices,
                                           c10::IntArrayRef counts, c10::ArrayRef<Int> stride,
                                           c10::ArrayRef<Int> padding, c10::ArrayRef<Int> dilation);

}  // namespace bap_kernels
