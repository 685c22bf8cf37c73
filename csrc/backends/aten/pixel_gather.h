// Gather of the listed channels of a channels_last input.
#pragma once

#include <ATen/core/Tensor.h>

namespace bap_kernels {

// Whether gather_pixels can: elements of 2 or 4 bytes, channels next to each other.
bool gather_pixels_applies(const at::Tensor& x);

// x[:, index], contiguous in channels_last. Needs an int32 `index` within range.
at::Tensor gather_pixels(const at::Tensor& x, const at::Tensor& index);

}  // namespace bap_kernels
