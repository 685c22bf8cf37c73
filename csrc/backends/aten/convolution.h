// PyTorch's convolution and its gradients, for every call of ours that reaches them. On CPUs, cases in which its
// kernels are wrong go another way: by columns and a matrix product (im2col), in float32 for 16-bit dtypes.
//
// What tools/search_convolution_faults.py finds in oneDNN as of PyTorch 2.14, with what a result or its memory shows:
//
//   forward, 16 bit     result one column wide (oW = 1), stride_w > 1, kernel_w > 1            uninitialised values
//   forward, float32    the same, with one input channel                                       uninitialised values
//   forward, any        an output row or column that reads nothing but padding                 crash
//   forward, bfloat16   kernel_w >= 4 and channels * kernel_w a multiple of 32 from 64 on,     wrong
//                       fewer than 32 channels, on CPUs with AMX
//   weight, 16 bit      oW <= 2, stride_w > 1                                                  uninitialised values
//   weight, float32     1x1 with strides, fewer than 8 channels, channels_last, on AVX2        writes behind its end
//
// The families that are kept away are wider than what was found.
#pragma once

#include "ops/op.h"

namespace bap_kernels {

// Padding is (rows, columns). For gradients `groups` is 1, or the number of channels of both input and result.
struct ConvolutionOptions {
  c10::IntArrayRef stride, padding, dilation;
  int64_t groups;
};

// A ReLU, and the largest result that it leaves, as 6 of ReLU6.
struct Clamp {
  bool relu = false;
  std::optional<double> most = std::nullopt;
};

// What follows a convolution: y = clamp(conv(x, w) + bias + residual). Tensors of x's dtype, undefined where absent.
struct ConvolutionEpilogue {
  at::Tensor bias, residual;
  Clamp clamp = {};
};

// Whether PyTorch's CPU kernels may not have a convolution of `channels` input channels in each group, or one that they
// may have but not its weight gradient.
bool convolution_fails(at::ScalarType dtype, int64_t channels, c10::IntArrayRef size, c10::IntArrayRef kernel,
                       const ConvolutionOptions& options, bool weight_gradient);
// Likewise for these tensors; false on other devices and for sizes that are symbols.
bool convolution_fails(const at::Tensor& x, const at::Tensor& w, const ConvolutionOptions& options,
                       bool weight_gradient);

at::Tensor convolution(const at::Tensor& x, const at::Tensor& w, const OptionalTensor& bias,
                       const ConvolutionOptions& options);

// With what follows in the same call where a library has that, else in passes that write into the result. `device` is
// that of the tensors, except in tests.
at::Tensor convolution(const at::Tensor& x, const at::Tensor& w, const ConvolutionEpilogue& epilogue,
                       const ConvolutionOptions& options, c10::DeviceType device);

// y, which nothing else sees, with the sum and the clamp of the epilogue, in the memory format: in place where y has
// it.
at::Tensor add_clamp(at::Tensor y, const at::Tensor& residual, Clamp clamp, at::MemoryFormat format);

// The gradients of x and w; undefined where they are not wanted.
std::pair<at::Tensor, at::Tensor> convolution_gradients(const at::Tensor& grad_output, const at::Tensor& x,
                                                        const at::Tensor& w, const ConvolutionOptions& options,
                                                        bool wants_input, bool wants_weight);

}  // namespace bap_kernels
