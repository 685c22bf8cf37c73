// The native CPU path: what it can run, and the preparation that both drivers share.
#include "backends/cpu/native.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <limits>

#include "backends/cpu/depthwise.h"
#include "backends/cpu/isa.h"
#include "backends/cpu/native_call.h"
#include "backends/cpu/winograd.h"
#include "dispatch/packed_cache.h"
#include "dispatch/packed_memory.h"

namespace bap_kernels {
namespace {

// Copies of listed weights that serve fewer results take more than 3 % of the time: of weights that stay near, and of
// those that come from the last cache or from memory.
constexpr int64_t kPixelsForCopy = 512, kPixelsForFarCopy = 1536, kNearBytes = 1 << 20;

const float* float_data(NativeCall& n, const OptionalTensor& t) {
  if (!has_value(t)) return nullptr;
  n.keep_alive.push_back(t->to(at::kFloat).contiguous());
  return n.keep_alive.back().const_data_ptr<float>();
}

const int32_t* list_data(NativeCall& n, const OptionalTensor& list) {
  if (!has_value(list)) return nullptr;
  if (list->is_contiguous()) return list->const_data_ptr<int32_t>();
  n.keep_alive.push_back(list->contiguous());
  return n.keep_alive.back().const_data_ptr<int32_t>();
}

// scale * (sum + bias) + shift becomes scale * sum + (scale * bias + shift).
void fold_epilogue(const ConvCall& c, NativeCall& n) {
  const float* bias = float_data(n, c.bias);
  const float* scale = float_data(n, c.fusion.out_scale);
  const float* shift = float_data(n, c.fusion.out_shift);
  const int64_t padded = round_up(n.kept_out, micro::kMaxVectors * n.tiles->lanes) + n.tiles->rows;
  if (scale) {
    n.scale.assign(padded, 1.f);
    std::copy_n(scale, n.kept_out, n.scale.begin());
  }
  if (!bias && !shift) return;
  n.shift.assign(padded, 0.f);
  for (int64_t j = 0; j < n.kept_out; ++j) {
    float v = bias ? bias[n.out_index ? n.out_index[j] : j] : 0.f;
    if (scale) v *= scale[j];
    n.shift[j] = v + (shift ? shift[j] : 0.f);
  }
}

// Elements between neighbouring pixels where all pixels of a channels_last tensor follow each other at one distance, as
// in the first channels of a wider tensor; else 0.
int64_t pixel_step(const at::Tensor& t, at::MemoryFormat format) {
  if (format != at::MemoryFormat::ChannelsLast || (t.stride(1) != 1 && t.size(1) != 1)) return 0;
  const int64_t sizes[3] = {t.size(3), t.size(2), t.size(0)}, strides[3] = {t.stride(3), t.stride(2), t.stride(0)};
  int64_t step = 0, pixels = 1;
  for (int i = 0; i < 3; ++i) {
    if (sizes[i] == 1) continue;
    if (step == 0) step = strides[i];
    if (strides[i] != step * pixels) return 0;
    pixels *= sizes[i];
  }
  return step;
}

}  // namespace

std::string native_unsupported_reason(const ConvCall& c) {
  const auto dtype = c.input.scalar_type();
  if (isa() == "none") return kNoInstructions;
  if (dtype != at::kFloat && dtype != at::kBFloat16) {
    return std::string("no native kernel for ") + c10::toString(dtype) + " (float32 and bfloat16 only)";
  }
  if (c.shape.depthwise) return depthwise_unsupported_reason(c);
  const int64_t depth = c.shape.kept_in * c.taps();
  const int64_t largest = std::numeric_limits<int32_t>::max() / 4;
  if (depth > largest / 1024 || c.shape.channels_in > largest ||
      c.shape.batch * c.shape.out_h * c.shape.out_w > largest) {
    return "the shape is beyond 32-bit tile arithmetic";
  }
  return "";
}

NativeCall native_source(const at::Tensor& source, int64_t kept_in, std::array<int64_t, 2> kernel) {
  NativeCall n{};
  n.bfloat16 = source.scalar_type() == at::kBFloat16;
  n.pairs = n.bfloat16 && isa_has_bfloat16_pairs();
  n.tiles = isa_tiles(n.pairs);
  n.units = n.pairs ? (kept_in + 1) / 2 : kept_in;
  n.taps = kernel[0] * kernel[1];
  n.depth = n.units * n.taps;
  n.x = static_cast<const char*>(source.const_data_ptr());
  n.x_stride_n = source.stride(0);
  n.x_stride_c = source.stride(1);
  n.x_stride_h = source.stride(2);
  n.x_stride_w = source.stride(3);
  n.batch = source.size(0);
  n.channels_in = source.size(1);
  n.height = source.size(2);
  n.width = source.size(3);
  n.kept_in = kept_in;
  n.kernel_w = kernel[1];
  n.stride_h = n.stride_w = n.dilation_h = n.dilation_w = 1;
  return n;
}

void join_rows(NativeCall& n) {
  const bool pointwise = n.taps == 1 && n.stride_h == 1 && n.stride_w == 1 && n.pad_left == 0 && n.out_w == n.width &&
                         n.pad_top <= 0 && n.out_h - n.pad_top <= n.height;
  if (!pointwise || n.x_stride_h != n.width * n.x_stride_w) return;
  n.x -= n.pad_top * n.x_stride_h * n.element_size();
  n.width = n.out_w = n.out_h * n.width;
  n.height = n.out_h = 1;
  n.pad_top = n.x_stride_h = 0;
}

NativeCall prepare_native(const ConvCall& c, at::Tensor& result) {
  const auto& s = c.shape;
  NativeCall n = native_source(c.input, s.kept_in, {s.kernel_h, s.kernel_w});
  n.out_bfloat16 = n.bfloat16;
  n.stride_h = c.stride[0];
  n.stride_w = c.stride[1];
  n.dilation_h = c.dilation[0];
  n.dilation_w = c.dilation[1];
  n.pad_top = c.padding[kTop];
  n.pad_left = c.padding[kLeft];
  n.out_h = s.out_h;
  n.out_w = s.out_w;
  n.kept_out = s.kept_out;
  n.in_index = list_data(n, c.in_index);
  n.out_index = list_data(n, c.out_index);
  n.w = static_cast<const char*>(c.weight.const_data_ptr());
  n.w_stride_out = c.weight.stride(0);
  n.w_stride_in = c.weight.stride(1);
  n.w_stride_h = c.weight.stride(2);
  n.w_stride_w = c.weight.stride(3);
  n.weight_index = list_data(n, c.weight_index);
  join_rows(n);
  n.in_scale = float_data(n, c.fusion.in_scale);
  n.in_shift = float_data(n, c.fusion.in_shift);
  n.in_relu = c.fusion.in_relu;
  n.has_prologue = c.fusion.has_prologue();
  n.out_relu = c.fusion.out_relu;
  n.out_max = c.out_max ? static_cast<float>(*c.out_max) : std::numeric_limits<float>::infinity();
  fold_epilogue(c, n);
  if (has_value(c.fusion.residual)) {
    int64_t step = pixel_step(*c.fusion.residual, c.format());
    n.keep_alive.push_back(step ? *c.fusion.residual : c.fusion.residual->contiguous(c.format()));
    n.residual = static_cast<const char*>(n.keep_alive.back().const_data_ptr());
    n.residual_pixel = (step ? step : s.kept_out) * n.element_size();
  }
  if (!result.defined()) {
    result = at::empty({s.batch, s.kept_out, s.out_h, s.out_w}, c.input.options().memory_format(c.format()));
  }
  n.y = static_cast<char*>(result.mutable_data_ptr());
  const int64_t products = n.pixels() * n.kept_out * n.kept_in * n.taps;
  n.threads = threads_for(products);
  return n;
}

at::Tensor packed_weight(const ConvCall& c, const NativeCall& n) {
  const bool last = c.format() == at::MemoryFormat::ChannelsLast;
  // The packed form depends on the tiles, so on the lanes' meaning too.
  const int variant = n.tiles->lanes * 2 + (n.pairs ? 1 : 0);
  const PackedKind kind = last ? PackedKind::kConvNhwc : PackedKind::kConvNchw;
  const auto pack = [&](const NativeCall& source) {
    return last ? pack_weight_nhwc(source) : pack_weight_nchw(source);
  };
  PackedCache& cache = PackedCache::instance();
  const bool near = static_cast<int64_t>(c.weight.nbytes()) <= kNearBytes;
  if (!serves_all_lists(c, near ? kPixelsForCopy : kPixelsForFarCopy)) {
    return cache.get(c, kind, variant, [&] { return pack(n); });
  }
  const int64_t channels = c.weight.size(1);
  const at::Tensor all =
      cache.get(over_all_channels(c), kind, variant, [&] { return pack(n.over_all_channels(channels)); });
  return listed_part(n, all, channels, packed_layout(n, last));
}

void run_tasks(const NativeTasks& tasks) {
  const auto cycles = [&](int64_t task) { return tasks.cycles ? tasks.cycles(task) : 1.; };
  parallel_tasks(tasks.count, 1, cycles, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) tasks.run(task);
  });
}

void run_driver(const NativeCall& n, const at::Tensor& weight, bool channels_last) {
  const auto* w = weight.const_data_ptr<float>();
  run_tasks(channels_last ? conv_nhwc_tasks(n, w) : conv_nchw_tasks(n, w));
}

namespace {

at::Tensor run_native(const ConvCall& c, bool unmeasured) {
  if (c.shape.depthwise) return depthwise_gathered_conv2d(c);
  at::Tensor result;
  const NativeCall n = prepare_native(c, result);
  const bool last = c.format() == at::MemoryFormat::ChannelsLast;
  const int64_t size = unmeasured ? unmeasured_winograd(n, c.cache_packed) : 0;
  if (size == 0) {
    const at::Tensor weight = packed_weight(c, n);
    run_driver(n, weight, last);
  } else {
    const at::Tensor weight = packed_winograd_weight(c, n, size);
    run_winograd(n, weight, size, last);
  }
  return result;
}

}  // namespace

at::Tensor native_gathered_conv2d(const ConvCall& c) { return run_native(c, /*unmeasured=*/false); }
at::Tensor native_unmeasured_gathered_conv2d(const ConvCall& c) { return run_native(c, /*unmeasured=*/true); }

}  // namespace bap_kernels
