// PyTorch's convolution, kept away from what its CPU kernels get wrong. See convolution.h.
#include "backends/aten/convolution.h"

#include <ATen/OpMathType.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/_add_relu.h>
#include <ATen/ops/add.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/col2im.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/im2col.h>
#include <ATen/ops/matmul.h>
#include <c10/util/irange.h>

#include <algorithm>
#include <vector>

#include "backends/aten/fused_convolution.h"

namespace bap_kernels {
namespace {

// Most elements of the columns that are held at once.
constexpr int64_t kColumns = int64_t{8} << 20;

int64_t out_length(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  return (size + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
}

// Whether a row (or column) of the result may read nothing but padding.
bool reads_only_padding(int64_t size, int64_t kernel, int64_t padding, int64_t dilation) {
  return padding > 0 && (padding > dilation * (kernel - 1) || dilation > size);
}

// `t` with the strides of its memory format in dimensions of size 1, too, where PyTorch lets any stride pass: its
// kernels read layouts from them.
at::Tensor with_plain_strides(const at::Tensor& t) {
  if (std::find(t.sizes().begin(), t.sizes().end(), 1) == t.sizes().end()) return t;
  for (const auto format : {at::MemoryFormat::Contiguous, at::MemoryFormat::ChannelsLast}) {
    if (!t.is_contiguous(format)) continue;
    const auto& s = t.sizes();
    const bool last = format == at::MemoryFormat::ChannelsLast;
    const std::array<int64_t, 4> strides = {s[1] * s[2] * s[3], last ? 1 : s[2] * s[3], last ? s[3] * s[1] : s[3],
                                            last ? s[1] : 1};
    return t.strides() == c10::IntArrayRef(strides) ? t : t.as_strided(s, strides);
  }
  return t;
}

// A convolution as a product of its filters with columns, which hold for each output pixel what it reads:
//   y[n, o, l] = sum over k of w[o, k] * columns[n, k, l]        k = (channel, tap), l = output pixel
// Depthwise, each channel has a product of its own.
struct Columns {
  const at::Tensor &x, &w;
  const ConvolutionOptions& options;
  at::ScalarType dtype = at::toOpMathType(x.scalar_type());
  int64_t groups = options.groups, taps = w.size(2) * w.size(3);
  int64_t out_h = out_length(x.size(2), w.size(2), options.stride[0], options.padding[0], options.dilation[0]);
  int64_t out_w = out_length(x.size(3), w.size(3), options.stride[1], options.padding[1], options.dilation[1]);

  bool depthwise() const { return groups > 1; }
  // Samples whose columns are held at once.
  int64_t samples() const { return std::max<int64_t>(1, kColumns / (x.size(1) * taps * out_h * out_w)); }
  at::Tensor columns(const at::Tensor& part) const {
    return at::im2col(part.to(dtype), w.sizes().slice(2), options.dilation, options.padding, options.stride);
  }
  at::Tensor filters() const {
    const at::Tensor dense = w.to(dtype).contiguous();
    return depthwise() ? dense.view({1, groups, taps, 1}) : dense.view({w.size(0), -1});
  }
  // (N, groups, channels or filters in each, pixels) where depthwise, else (N, channels or filters, pixels).
  at::Tensor split(const at::Tensor& t, int64_t in_each) const {
    return depthwise() ? t.reshape({t.size(0), groups, in_each, out_h * out_w})
                       : t.reshape({t.size(0), -1, out_h * out_w});
  }

  at::Tensor forward() const {
    const at::Tensor f = filters();
    std::vector<at::Tensor> parts;
    for (const at::Tensor& part : x.split(samples())) {
      const at::Tensor c = split(columns(part), taps);
      parts.push_back((depthwise() ? (f * c).sum(2) : at::matmul(f, c)).view({part.size(0), -1, out_h, out_w}));
    }
    return at::cat(parts);
  }

  at::Tensor input_gradient(const at::Tensor& grad_output) const {
    const at::Tensor f = filters();
    std::vector<at::Tensor> parts;
    for (const at::Tensor& part : grad_output.to(dtype).split(samples())) {
      const at::Tensor dy = split(part, 1);
      const at::Tensor c = depthwise() ? (f * dy).reshape({part.size(0), -1, out_h * out_w}) : at::matmul(f.t(), dy);
      parts.push_back(
          at::col2im(c, x.sizes().slice(2), w.sizes().slice(2), options.dilation, options.padding, options.stride));
    }
    return at::cat(parts).to(x.scalar_type());
  }

  at::Tensor weight_gradient(const at::Tensor& grad_output) const {
    const auto dy_parts = grad_output.to(dtype).split(samples()), x_parts = x.split(samples());
    at::Tensor sum;
    for (const auto i : c10::irange(x_parts.size())) {
      const at::Tensor c = split(columns(x_parts[i]), taps), dy = split(dy_parts[i], 1);
      at::Tensor dw;
      if (depthwise()) {
        dw = (dy * c).sum(c10::IntArrayRef({0, 3}));
      } else {
        dw = dy.transpose(0, 1).reshape({w.size(0), -1}).mm(c.transpose(1, 2).reshape({-1, c.size(1)}));
      }
      sum = sum.defined() ? sum + dw : dw;
    }
    return sum.view(w.sizes()).to(w.scalar_type());
  }
};

// Groups of several channels one after the other.
at::Tensor forward_by_columns(const at::Tensor& x, const at::Tensor& w, const ConvolutionOptions& options) {
  if (options.groups == 1 || (w.size(1) == 1 && w.size(0) == options.groups)) return Columns{x, w, options}.forward();
  const auto xs = x.chunk(options.groups, 1), ws = w.chunk(options.groups, 0);
  ConvolutionOptions one = options;
  one.groups = 1;
  std::vector<at::Tensor> parts;
  for (const auto i : c10::irange(xs.size())) parts.push_back(Columns{xs[i], ws[i], one}.forward());
  return at::cat(parts, 1);
}

}  // namespace

bool convolution_fails(at::ScalarType dtype, int64_t channels, c10::IntArrayRef size, c10::IntArrayRef kernel,
                       const ConvolutionOptions& o, bool weight_gradient) {
  const bool half = dtype == at::kBFloat16 || dtype == at::kHalf;
  if (!half && dtype != at::kFloat) return false;  // oneDNN has no other
  const int64_t out_w = out_length(size[1], kernel[1], o.stride[1], o.padding[1], o.dilation[1]);
  if (o.stride[1] > 1 && out_w <= (half ? 4 : 2)) return true;
  if (reads_only_padding(size[0], kernel[0], o.padding[0], o.dilation[0]) ||
      reads_only_padding(size[1], kernel[1], o.padding[1], o.dilation[1])) {
    return true;
  }
  const bool dense = o.groups == 1 || channels > 1;
  if (half && dense && channels < 64 &&
      (kernel[1] >= 8 || (kernel[1] >= 4 && channels % 2 == 0 && channels * kernel[1] % 32 == 0))) {
    return true;
  }
  return weight_gradient && channels < 16 && kernel[0] * kernel[1] == 1 && (o.stride[0] > 1 || o.stride[1] > 1);
}

bool convolution_fails(const at::Tensor& x, const at::Tensor& w, const ConvolutionOptions& o, bool weight_gradient) {
  if (!x.device().is_cpu() || x.unsafeGetTensorImpl()->has_symbolic_sizes_strides()) return false;
  return convolution_fails(x.scalar_type(), w.size(1), x.sizes().slice(2), w.sizes().slice(2), o, weight_gradient);
}

at::Tensor convolution(const at::Tensor& x, const at::Tensor& w, const OptionalTensor& bias,
                       const ConvolutionOptions& options) {
  if (!convolution_fails(x, w, options, /*weight_gradient=*/false)) {
    const bool plain = !x.device().is_cpu();
    return at::convolution(plain ? x : with_plain_strides(x), plain ? w : with_plain_strides(w), bias, options.stride,
                           options.padding, options.dilation, /*transposed=*/false, {0, 0}, options.groups);
  }
  at::Tensor y = forward_by_columns(x, w, options);
  if (has_value(bias)) y = y + bias->to(y.scalar_type()).view({1, -1, 1, 1});
  return y.to(x.scalar_type());
}

at::Tensor add_clamp(at::Tensor y, const at::Tensor& residual, Clamp clamp, at::MemoryFormat format) {
  const auto clamped = [&clamp](at::Tensor& t) {
    if (clamp.most.has_value()) return t.clamp_(0, *clamp.most);
    return clamp.relu ? t.relu_() : t;
  };
  if (!residual.defined()) return clamped(y).contiguous(format);
  at::Tensor out = y.is_contiguous(format) ? y : at::empty(y.sizes(), y.options().memory_format(format));
  // One pass for both, where PyTorch has it.
  if (clamp.relu && !clamp.most && y.is_cpu() && (y.scalar_type() == at::kFloat || y.scalar_type() == at::kDouble)) {
    return at::_add_relu_out(out, y, residual);
  }
  at::add_out(out, y, residual);
  return clamped(out);
}

at::Tensor convolution(const at::Tensor& x, const at::Tensor& w, const ConvolutionEpilogue& e,
                       const ConvolutionOptions& options, c10::DeviceType device) {
  const auto format = x.suggest_memory_format();
  if (!convolution_fails(x, w, options, /*weight_gradient=*/false)) {
    const bool plain = !x.device().is_cpu();
    const auto fused =
        fused_convolution(plain ? x : with_plain_strides(x), plain ? w : with_plain_strides(w), e, options, device);
    if (fused.has_value()) return *fused;
  }
  const auto bias = e.bias.defined() ? OptionalTensor(e.bias) : std::nullopt;
  return add_clamp(convolution(x, w, bias, options), e.residual, e.clamp, format);
}

std::pair<at::Tensor, at::Tensor> convolution_gradients(const at::Tensor& grad_output, const at::Tensor& x,
                                                        const at::Tensor& w, const ConvolutionOptions& options,
                                                        bool wants_input, bool wants_weight) {
  if (!convolution_fails(x, w, options, wants_weight)) {
    const bool plain = !x.device().is_cpu();
    auto [dx, dw, db] = at::convolution_backward(
        plain ? grad_output : with_plain_strides(grad_output), plain ? x : with_plain_strides(x),
        plain ? w : with_plain_strides(w), std::nullopt, options.stride, options.padding, options.dilation,
        /*transposed=*/false, {0, 0}, options.groups, {wants_input, wants_weight, false});
    return {dx, dw};
  }
  const Columns columns{x, w, options};
  return {wants_input ? columns.input_gradient(grad_output) : at::Tensor(),
          wants_weight ? columns.weight_gradient(grad_output) : at::Tensor()};
}

}  // namespace bap_kernels
