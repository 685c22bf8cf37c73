// See pooling.h.
#include "backends/cpu/pooling.h"

#include <ATen/native/Pool.h>
#include <ATen/ops/adaptive_avg_pool2d.h>
#include <ATen/ops/avg_pool2d.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/max_pool2d.h>

#include "backends/cpu/depthwise.h"
#include "backends/cpu/isa.h"
#include "ops/plain_tensor.h"

namespace bap_kernels {
namespace {

using Pair = std::array<int64_t, 2>;

// Fewer results of a plane do not pay for copying its strips.
constexpr int64_t kFewestOfPlane = 16;

// Whether our kernels may stand for PyTorch's call, which autocast would change.
bool may_serve(const at::Tensor& x) { return isa_depthwise() != nullptr && is_plain_tensor(x) && calls_keep_dtypes(); }

// Pairs are (height, width).
struct Window {
  Pair kernel, stride, padding, dilation;
  bool ceil_mode;

  // Whether PyTorch takes it, and it lies inside of the padded image; else PyTorch says what is wrong.
  bool fits(const at::Tensor& x) const {
    for (int axis = 0; axis < 2; ++axis) {
      const int64_t reach = dilation[axis] * (kernel[axis] - 1) + 1;
      if (kernel[axis] < 1 || stride[axis] < 1 || dilation[axis] < 1 || padding[axis] < 0) return false;
      if (padding[axis] > reach / 2 || reach > x.size(2 + axis) + 2 * padding[axis]) return false;
    }
    return true;
  }

  int64_t results(const at::Tensor& x, int axis) const {
    return at::native::pooling_output_shape<int64_t>(x.size(2 + axis), kernel[axis], padding[axis], stride[axis],
                                                     dilation[axis], ceil_mode);
  }
};

bool serves(const at::Tensor& x, const Window& window) {
  const bool known = x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16;
  if (!may_serve(x) || !known || x.dim() != 4 || x.numel() == 0 || x.is_conj() || x.is_neg()) return false;
  if (!window.fits(x)) return false;
  if (x.suggest_memory_format() == at::MemoryFormat::ChannelsLast) return x.stride(1) == 1;
  return window.results(x, 0) * window.results(x, 1) >= kFewestOfPlane;
}

at::Tensor pool(const at::Tensor& x, micro::TapOp op, const Window& window) {
  NativeCall n = native_source(x, 1, window.kernel);
  n.out_bfloat16 = n.bfloat16;
  n.stride_h = window.stride[0], n.stride_w = window.stride[1];
  n.pad_top = window.padding[0], n.pad_left = window.padding[1];
  n.dilation_h = window.dilation[0], n.dilation_w = window.dilation[1];
  n.kept_out = x.size(1);
  n.out_h = window.results(x, 0), n.out_w = window.results(x, 1);
  if (op == micro::TapOp::kSum) {
    n.scale.assign(round_up(n.kept_out, isa_depthwise()->lanes), 1.f / static_cast<float>(n.taps));
  }
  const at::MemoryFormat format = x.suggest_memory_format();
  const at::Tensor result = at::empty({n.batch, n.kept_out, n.out_h, n.out_w}, x.options().memory_format(format));
  n.y = static_cast<char*>(result.mutable_data_ptr());
  n.threads = depthwise_threads(n);
  run_depthwise(n, op, nullptr, format == at::MemoryFormat::ChannelsLast);
  return result;
}

}  // namespace

at::Tensor max_pool2d(const at::Tensor& x, Pair kernel, Pair stride, Pair padding, Pair dilation, bool ceil_mode) {
  const Window window{kernel, stride, padding, dilation, ceil_mode};
  if (serves(x, window)) return pool(x, micro::TapOp::kMax, window);
  return at::max_pool2d(x, kernel, stride, padding, dilation, ceil_mode);
}

at::Tensor avg_pool2d(const at::Tensor& x, Pair kernel, Pair stride) {
  const Window window{kernel, stride, {0, 0}, {1, 1}, false};
  return serves(x, window) ? pool(x, micro::TapOp::kSum, window) : at::avg_pool2d(x, kernel, stride);
}

at::Tensor global_avg_pool2d(const at::Tensor& x) {
  const bool ours = may_serve(x) && x.dim() == 4 && x.numel() > 0 && x.is_contiguous(at::MemoryFormat::ChannelsLast);
  if (!ours) return at::adaptive_avg_pool2d(x, {1, 1});
  const Pair size{x.size(2), x.size(3)};
  return avg_pool2d(x, size, size);
}

}  // namespace bap_kernels
