// Packing of the listed weight slices into the panels that the tiles read front to back.
//   pixel_rows    panel of output channels: [tap][channel unit][lane], the last panel one or two vectors wide
//   channel_rows  panel of output channels: [channel unit][tap][row], the last panel as narrow as it needs to be
// A unit is one channel, or two bfloat16 channels side by side; what is missing is zero.
#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "cpu/native_call.h"

namespace bap_kernels {
namespace {

constexpr int64_t kFloatsPerThread = 32 * 1024;

int64_t panel_width(const NativeCall& n, bool channel_rows, int64_t panel) {
  if (channel_rows) return std::min<int64_t>(n.tiles->rows, n.kept_out - panel * n.tiles->rows);
  const int64_t full = micro::kMaxVectors * n.tiles->lanes;
  return n.kept_out - panel * full <= n.tiles->lanes ? n.tiles->lanes : full;
}

template <class scalar_t>
void pack_panel(const ConvCall& c, const NativeCall& n, bool channel_rows, int64_t panel, float* dst) {
  const int64_t full = channel_rows ? n.tiles->rows : micro::kMaxVectors * n.tiles->lanes;
  const int64_t width = panel_width(n, channel_rows, panel);
  const int64_t first = panel * full;
  const int64_t filters = std::min(full, n.kept_out - first);
  const auto* w = c.weight.const_data_ptr<scalar_t>();
  const auto strides = c.weight.strides();
  const int64_t unit_step = channel_rows ? n.taps : 1, tap_step = channel_rows ? 1 : n.units;
  for (int64_t j = 0; j < filters; ++j) {
    const auto* filter = w + (n.out_index ? n.out_index[first + j] : first + j) * strides[0];
    for (int64_t i = 0; i < n.kept_in; ++i) {
      const auto* slice = filter + n.weight_channel(i) * strides[1];
      const int64_t unit = n.pairs ? i / 2 : i;
      for (int64_t t = 0; t < n.taps; ++t) {
        const scalar_t value = slice[t / n.kernel_w * strides[2] + t % n.kernel_w * strides[3]];
        const int64_t at = (unit * unit_step + t * tap_step) * width + j;
        if (n.pairs) {
          reinterpret_cast<c10::BFloat16*>(dst)[2 * at + i % 2] = value;
        } else {
          dst[at] = static_cast<float>(value);
        }
      }
    }
  }
}

at::Tensor pack(const ConvCall& c, const NativeCall& n, bool channel_rows) {
  const int64_t full = channel_rows ? n.tiles->rows : micro::kMaxVectors * n.tiles->lanes;
  const int64_t panels = (n.kept_out + full - 1) / full;
  const int64_t floats = ((panels - 1) * full + panel_width(n, channel_rows, panels - 1)) * n.depth;
  at::Tensor packed = at::zeros({floats}, c.weight.options().dtype(at::kFloat));
  float* dst = packed.mutable_data_ptr<float>();
  // Small weights are packed sooner than a second thread wakes.
  const int64_t grain = std::max<int64_t>(1, kFloatsPerThread / (full * n.depth));
  at::parallel_for(0, panels, grain, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      if (n.bfloat16) {
        pack_panel<c10::BFloat16>(c, n, channel_rows, p, dst + p * full * n.depth);
      } else {
        pack_panel<float>(c, n, channel_rows, p, dst + p * full * n.depth);
      }
    }
  });
  return packed;
}

}  // namespace

at::Tensor pack_weight_pixel_rows(const ConvCall& c, const NativeCall& n) { return pack(c, n, false); }
at::Tensor pack_weight_channel_rows(const ConvCall& c, const NativeCall& n) { return pack(c, n, true); }

}  // namespace bap_kernels
