// Where Winograd applies, and its transformed weights.
#include "backends/cpu/winograd.h"

#include <ATen/ops/empty.h>

#include "backends/cpu/isa.h"
#include "backends/cpu/microkernels/winograd.h"
#include "backends/cpu/native.h"
#include "dispatch/backend.h"
#include "dispatch/packed_cache.h"
#include "dispatch/packed_memory.h"
#include "dispatch/winograd.h"

namespace bap_kernels {
namespace {

constexpr int64_t kFloatsPerThread = 32 * 1024, kChannelsPerTask = 32;
// With fewer channels the transforms take longer than what they save.
constexpr int64_t kFewestChannels = 16, kFewestPairs = 32 * 32;
// Results for which a weight's transform pays.
constexpr int64_t kPixelsForTransform = 512;
// Results for which a copy of listed weights takes at most 3 % of the time.
constexpr int64_t kPixelsForCopy = 12288;
// Results computed for each one that there is: twice as many still leave half of the multiplications.
constexpr int64_t kMostWaste = 2;
constexpr int64_t kMostLanes = 16, kTaps = 9;

}  // namespace

std::string winograd_unsupported_reason(const ConvCall& c) {
  std::string reason = native_unsupported_reason(c);
  if (!reason.empty()) return reason;
  if (c.input.scalar_type() != at::kFloat) return "Winograd kernels compute in float32 only";
  if (winograd_shape(c.shape, c.stride, c.dilation)) return "";
  return "Winograd kernels are for 3 x 3 taps, stride 1 and dilation 1";
}

std::vector<int64_t> winograd_promises(const ConvCall& c) {
  if (!get_winograd() || !winograd_unsupported_reason(c).empty()) return {};
  if (c.shape.kept_in < kFewestChannels || c.shape.kept_out < kFewestChannels) return {};
  return {kWinogradLarge, kWinogradSmall};
}

int64_t winograd_of_weight_gradient(const GradientCall& c) {
  NativeCall n = native_source(c.input, c.shape.kept_in, {c.shape.kernel_h, c.shape.kernel_w});
  n.stride_h = c.stride[0];
  n.stride_w = c.stride[1];
  n.dilation_h = c.dilation[0];
  n.dilation_w = c.dilation[1];
  n.out_h = c.shape.out_h;
  n.out_w = c.shape.out_w;
  n.kept_out = c.live_count();
  return unmeasured_winograd(n, /*weight_is_kept=*/true);
}

int64_t unmeasured_winograd(const NativeCall& n, bool weight_is_kept) {
  if (!winograd_applies(n)) return 0;
  if (forced_winograd() != 0) return forced_winograd();
  if (!get_winograd() || backend_is_named()) return 0;
  if (n.kept_in < kFewestChannels || n.kept_out < kFewestChannels || n.kept_in * n.kept_out < kFewestPairs) return 0;
  if (!weight_is_kept && n.pixels() < kPixelsForTransform) return 0;
  const auto padded = [](int64_t results) { return (results + kWinogradLarge - 1) / kWinogradLarge * kWinogradLarge; };
  const int64_t computed = padded(n.out_h) * padded(n.out_w);
  return kMostWaste * n.out_h * n.out_w >= computed ? kWinogradLarge : 0;
}

bool winograd_applies(const NativeCall& n) {
  return !n.bfloat16 && !n.out_bfloat16 && n.taps == kTaps && n.kernel_w == 3 && n.stride_h == 1 && n.stride_w == 1 &&
         n.dilation_h == 1 && n.dilation_w == 1;
}

at::Tensor pack_weight_winograd(const NativeCall& n, int64_t size) {
  const micro::WinogradTable& table = *isa_winograd();
  const auto transform = table.transforms[size == kWinogradLarge ? 0 : 1].weight;
  const int64_t points = (size + 2) * (size + 2), lanes = table.lanes, full = 2 * lanes;
  const int64_t panels = (n.kept_out + full - 1) / full, last = n.kept_out - (panels - 1) * full;
  const auto width_of = [&](int64_t panel) { return panel + 1 == panels && last <= lanes ? lanes : full; };
  const int64_t floats = ((panels - 1) * full + width_of(panels - 1)) * points * n.kept_in;
  at::Tensor packed = at::empty({floats}, at::TensorOptions().dtype(at::kFloat));
  float* dst = packed.mutable_data_ptr<float>();
  const auto* w = reinterpret_cast<const float*>(n.w);
  int64_t taps[kTaps];
  for (int64_t t = 0; t < kTaps; ++t) taps[t] = t / 3 * n.w_stride_h + t % 3 * n.w_stride_w;
  // Tasks are panels x groups of channels.
  const int64_t groups = ceil_div(n.kept_in, kChannelsPerTask);
  const int64_t grain =
      std::max<int64_t>(1, kFloatsPerThread / (full * points * std::min(n.kept_in, kChannelsPerTask)));
  const auto range_of = [&](int64_t task) {
    const int64_t group = task % groups;
    return std::pair(group * n.kept_in / groups, (group + 1) * n.kept_in / groups);
  };
  const auto cycles = [&](int64_t task) {
    const auto [first, last] = range_of(task);
    return pass_cycles(4 * width_of(task / groups) * points * (last - first));
  };
  parallel_tasks(panels * groups, grain, cycles, [&](int64_t begin, int64_t end) {
    alignas(64) float filters[kTaps * kMostLanes] = {};
    for (int64_t task = begin; task < end; ++task) {
      const int64_t panel = task / groups, width = width_of(panel);
      float* of_panel = dst + panel * full * points * n.kept_in;
      for (auto [i, last] = range_of(task); i < last; ++i) {
        const float* channel = w + n.weight_channel(i) * n.w_stride_in;
        for (int64_t lane = 0; lane < width; lane += lanes) {
          const int64_t first = panel * full + lane, count = std::min(lanes, n.kept_out - first);
          for (int64_t j = 0; j < count; ++j) {
            const float* filter = channel + (n.out_index ? n.out_index[first + j] : first + j) * n.w_stride_out;
            for (int64_t t = 0; t < kTaps; ++t) filters[t * lanes + j] = filter[taps[t]];
          }
          for (int64_t t = 0; count < lanes && t < kTaps; ++t)
            std::fill_n(filters + t * lanes + count, lanes - count, 0.f);
          transform({filters, of_panel + i * width + lane, n.kept_in * width});
        }
      }
    }
  });
  return packed;
}

at::Tensor packed_winograd_weight(const ConvCall& c, const NativeCall& n, int64_t size) {
  const PackedKind kind = size == kWinogradLarge ? PackedKind::kWinograd4 : PackedKind::kWinograd2;
  const int64_t lanes = isa_winograd()->lanes, width = 2 * lanes, points = (size + 2) * (size + 2);
  PackedCache& cache = PackedCache::instance();
  const auto get = [&](const ConvCall& call, const NativeCall& source) {
    return cache.get(call, kind, static_cast<int>(lanes), [&] { return pack_weight_winograd(source, size); });
  };
  if (!serves_all_lists(c, kPixelsForCopy)) return get(c, n);
  const int64_t channels = c.weight.size(1), panels = (n.kept_out + width - 1) / width;
  const int64_t last_width = n.kept_out - (panels - 1) * width <= lanes ? lanes : width;
  const at::Tensor all = get(over_all_channels(c), n.over_all_channels(channels));
  return listed_part(n, all, channels, {panels, width, last_width, points, 1});
}

void run_winograd(const NativeCall& n, const at::Tensor& weight, int64_t size, bool channels_last) {
  run_tasks(conv_winograd_tasks(n, weight.const_data_ptr<float>(), size, channels_last));
}

at::Tensor winograd_gathered_conv2d(const ConvCall& c, int64_t size) {
  at::Tensor result;
  const NativeCall n = prepare_native(c, result);
  const at::Tensor weight = packed_winograd_weight(c, n, size);
  run_winograd(n, weight, size, c.format() == at::MemoryFormat::ChannelsLast);
  return result;
}

}  // namespace bap_kernels
