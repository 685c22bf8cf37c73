// See fused_convolution.h.
#include "backends/aten/fused_convolution.h"

#include <ATen/Context.h>
#include <ATen/native/ConvUtils.h>
#include <ATen/ops/cudnn_convolution_add_relu.h>
#include <ATen/ops/cudnn_convolution_relu.h>
#include <ATen/ops/zeros.h>

#include <exception>
#include <mutex>
#include <sstream>
#include <string>
#include <unordered_set>

#include "backends/aten/onednn.h"
#include "dispatch/python_hooks.h"

namespace bap_kernels {
namespace {

using at::native::ConvBackend;

ConvBackend backend_of(const at::Tensor& x, const at::Tensor& w, const ConvolutionEpilogue& e,
                       const ConvolutionOptions& o) {
  const auto bias = e.bias.defined() ? OptionalTensor(e.bias) : std::nullopt;
  const std::array<c10::SymInt, 2> none = {0, 0};
  return at::native::select_conv_backend(x, w, bias, c10::fromIntArrayRefSlow(o.stride),
                                         c10::fromIntArrayRefSlow(o.padding), c10::fromIntArrayRefSlow(o.dilation),
                                         /*transposed=*/false, none, o.groups, std::nullopt);
}

// Whether elements of the residual lie as those of the result will.
bool lies_as(const at::Tensor& residual, at::MemoryFormat format) {
  return !residual.defined() || residual.is_contiguous(format);
}

// The cases that cuDNN has no fused engine for, found by trying.
class Refused {
 public:
  static Refused& instance() {
    static auto* refused = new Refused();
    return *refused;
  }
  bool has(const std::string& key) {
    std::lock_guard<std::mutex> lock(mutex_);
    return keys_.count(key) > 0;
  }
  void add(const std::string& key) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (keys_.size() < kMost) keys_.insert(key);
  }

 private:
  static constexpr size_t kMost = 4096;
  std::mutex mutex_;
  std::unordered_set<std::string> keys_;
};

std::string cudnn_key(const at::Tensor& x, const at::Tensor& w, const ConvolutionEpilogue& e,
                      const ConvolutionOptions& o) {
  std::ostringstream key;
  key << x.device() << x.scalar_type() << x.sizes() << x.strides() << w.sizes() << o.stride << o.padding << o.dilation
      << e.residual.defined() << at::globalContext().benchmarkCuDNN();
  return key.str();
}

std::optional<at::Tensor> cudnn_convolution(const at::Tensor& x, const at::Tensor& w, const ConvolutionEpilogue& e,
                                            const ConvolutionOptions& o) {
  const std::string key = cudnn_key(x, w, e, o);
  if (Refused::instance().has(key)) return std::nullopt;
  const at::Tensor bias = e.bias.defined() ? e.bias : at::zeros({w.size(0)}, x.options().memory_format(std::nullopt));
  try {
    if (!e.residual.defined()) {
      return at::cudnn_convolution_relu(x, w, bias, o.stride, o.padding, o.dilation, o.groups);
    }
    return at::cudnn_convolution_add_relu(x, w, e.residual, 1, bias, o.stride, o.padding, o.dilation, o.groups);
  } catch (const c10::OutOfMemoryError&) {
    throw;
  } catch (...) {
    if (is_interrupt(std::current_exception())) throw;
    Refused::instance().add(key);
    return std::nullopt;
  }
}

}  // namespace

bool cudnn_fuses(at::ScalarType dtype, int64_t groups, c10::DeviceType device) {
  const auto& context = at::globalContext();
  return device == c10::kCUDA && (dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16) && groups == 1 &&
         context.userEnabledCuDNN() && !context.deterministicCuDNN() && !context.deterministicAlgorithms();
}

std::optional<at::Tensor> fused_convolution(const at::Tensor& x, const at::Tensor& w, const ConvolutionEpilogue& e,
                                            const ConvolutionOptions& o, c10::DeviceType device) {
  if (!e.clamp.relu && !e.residual.defined()) return std::nullopt;
  const auto dtype = x.scalar_type();
  const auto format = x.suggest_memory_format();
  if (device == c10::kCUDA) {
    if (!e.clamp.relu || e.clamp.most || !cudnn_fuses(dtype, o.groups, device) || !lies_as(e.residual, format))
      return std::nullopt;
    if (x.is_cuda() && backend_of(x, w, e, o) != ConvBackend::Cudnn) return std::nullopt;
    return cudnn_convolution(x, w, e, o);
  }
  if (device != c10::kCPU || !onednn_convolves(dtype, o.groups, e)) return std::nullopt;
  // In NCHW PyTorch adds in passes of their own, and not for all dtypes.
  if (e.residual.defined() && !(format == at::MemoryFormat::ChannelsLast && lies_as(e.residual, format))) {
    return std::nullopt;
  }
  if (backend_of(x, w, e, o) != ConvBackend::Mkldnn) return std::nullopt;
  return onednn_convolution(x, w, e, o);
}

}  // namespace bap_kernels
