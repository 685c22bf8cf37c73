// oneDNN's convolutions with what follows them, by PyTorch's private operators: looked up by name, since a build of
// PyTorch without oneDNN has none of them and another version may have changed them.
#pragma once

#include "backends/aten/convolution.h"

namespace bap_kernels {

// Whether oneDNN is on and has the dtype on this machine, and PyTorch the operator that reorders weights.
bool onednn_reorders(at::ScalarType dtype);

// `w` in the order that oneDNN wants for inputs of `size`.
at::Tensor onednn_reorder(const at::Tensor& w, const ConvolutionOptions& options, c10::IntArrayRef size);

// Whether onednn_convolution has the dtype and the epilogue. With groups PyTorch adds a residual in a pass of its own,
// which it has for float32 alone; of clamps behind a residual it has the ReLU alone.
bool onednn_convolves(at::ScalarType dtype, int64_t groups, const ConvolutionEpilogue& epilogue);

// The convolution in one call; a residual needs channels_last or a reordered weight. The result is channels_last where
// the weight was reordered, else as PyTorch's convolution has it. Its ReLU and its clamp make numbers of NaN.
at::Tensor onednn_convolution(const at::Tensor& x, const at::Tensor& w, const ConvolutionEpilogue& epilogue,
                              const ConvolutionOptions& options);

}  // namespace bap_kernels
