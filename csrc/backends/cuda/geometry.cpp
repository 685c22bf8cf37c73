// Which calls the kernels cover, and the axes of a call.
#include <algorithm>
#include <string>

#include "backends/cuda/launches.h"
#include "dispatch/verdicts.h"

namespace bap_kernels {

std::string uncovered_reason(const at::Tensor& input, const at::Tensor& weight, int64_t groups, int64_t out_h,
                             int64_t out_w) {
  const auto dtype = input.scalar_type();
  const int64_t pixels = input.size(0) * std::max(input.size(2) * input.size(3), out_h * out_w);
  if (dtype != at::kFloat && dtype != at::kHalf && dtype != at::kBFloat16) {
    return std::string("no CUDA kernel for ") + c10::toString(dtype) + " (float16, bfloat16, and float32 as TF32 only)";
  }
  // By the user's wish for float32 convolutions, under its older or its newer name.
  if (math_of(input) == FamilyMath::kFloat32) {
    return "no CUDA kernel for float32 unless torch.backends.cudnn.allow_tf32 lets convolutions round it to TF32";
  }
  if (groups != 1) return "no CUDA kernel for depthwise convolutions";
  // A bit for each in 32.
  if (weight.size(2) + weight.size(3) > 32) return "rows and columns of taps that add up to more than 32";
  if (input.size(0) >= 65536) return "a batch of more than 65535 images";
  if (pixels >= int64_t{1} << 30 || weight.numel() >= int64_t{1} << 30) {
    return "the shape is beyond 32-bit tile arithmetic";
  }
  if (cuda_launcher() == nullptr) return "bap_kernels._C_cuda is not loaded";
  if (!(cuda_launcher()->simulated ? input.is_cpu() : input.is_cuda())) {
    return "it does not compute on the tensors' device, " + input.device().str();
  }
  return "";
}

void refuse_uncovered(const char* op, const at::Tensor& input, const at::Tensor& weight, int64_t groups, int64_t out_h,
                      int64_t out_w) {
  const std::string reason = uncovered_reason(input, weight, groups, out_h, out_w);
  TORCH_CHECK_NOT_IMPLEMENTED(reason.empty(), op,
                              "(): expected a call that backend `cuda` can run, got one that it cannot: ", reason,
                              ". Hint: use_backend(\"auto\") takes the ATen path where CUDA cannot run.");
}

std::array<ConvAxis, 2> axes_of(const at::Tensor& input, const at::Tensor& weight, int64_t out_h, int64_t out_w,
                                c10::IntArrayRef stride, c10::IntArrayRef padding, c10::IntArrayRef dilation) {
  const auto axis = [&](int d, int64_t output, int64_t before) {
    return ConvAxis{static_cast<int>(input.size(2 + d)), static_cast<int>(output), static_cast<int>(weight.size(2 + d)),
                    static_cast<int>(stride[d]),         static_cast<int>(before), static_cast<int>(dilation[d])};
  };
  return {axis(0, out_h, padding[kTop]), axis(1, out_w, padding[kLeft])};
}

bool pointwise(const std::array<ConvAxis, 2>& axes) {
  return std::all_of(axes.begin(), axes.end(), [](const ConvAxis& a) {
    return a.kernel == 1 && a.stride == 1 && a.before == 0 && a.input == a.output;
  });
}

}  // namespace bap_kernels
