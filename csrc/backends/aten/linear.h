// Linear layers of few samples, such as a plan's classifier: their time is that of reading the weight.
#pragma once

#include "ops/op.h"

namespace bap_kernels {

// at::linear. Of few samples, (N, C) times (K, C), each thread reads some of the weight's rows: PyTorch's product of a
// matrix and a vector runs on one thread, and that of a thin matrix hardly gains by a second.
at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias);

}  // namespace bap_kernels
