// Packing of the listed weight slices into the panels that the tiles read front to back.
//   conv_nhwc  panel of output channels: [tap][channel unit][lane], the last panel one or two vectors wide
//   conv_nchw  panel of output channels: [channel unit][tap][row], the last panel as narrow as it needs to be
// A unit is one channel, or two bfloat16 channels side by side; what is missing is zero.
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstring>

#include "backends/cpu/native_call.h"

namespace bap_kernels {
namespace {

constexpr int64_t kMostLanes = 16;  // of any instruction set
constexpr int64_t kFloatsPerThread = 32 * 1024;

int64_t panel_width(const NativeCall& n, bool nchw, int64_t panel) {
  if (nchw) return std::min<int64_t>(n.tiles->rows, n.kept_out - panel * n.tiles->rows);
  const int64_t full = micro::kMaxVectors * n.tiles->lanes;
  return n.kept_out - panel * full <= n.tiles->lanes ? n.tiles->lanes : full;
}

// One unit after the other, all lanes of it: the filters' places in memory advance side by side, so each cache line is
// read once and written once. `taps` holds the place of each tap.
template <class scalar_t>
void pack_panel(const NativeCall& n, const std::vector<int64_t>& taps, bool nchw, int64_t panel, float* dst) {
  const int64_t full = nchw ? n.tiles->rows : micro::kMaxVectors * n.tiles->lanes;
  const int64_t width = panel_width(n, nchw, panel);
  const int64_t first = panel * full;
  const int64_t filters = std::min(full, n.kept_out - first);
  if (filters < width || (n.pairs && n.kept_in % 2)) std::fill_n(dst, width * n.depth, 0.f);
  const auto* w = reinterpret_cast<const scalar_t*>(n.w);
  const int64_t unit_step = (nchw ? n.taps : 1) * width, tap_step = (nchw ? 1 : n.units) * width;
  int64_t filter[micro::kMaxVectors * kMostLanes];
  for (int64_t j = 0; j < filters; ++j) filter[j] = (n.out_index ? n.out_index[first + j] : first + j) * n.w_stride_out;
  const bool neighbours = !n.out_index && n.w_stride_out == 1;  // as in the gradient of a channels_last input
  for (int64_t i = 0; i < n.kept_in; ++i) {
    const scalar_t* channel = w + n.weight_channel(i) * n.w_stride_in;
    float* unit = dst + (n.pairs ? i / 2 : i) * unit_step;
    for (int64_t t = 0; t < n.taps; ++t) {
      const scalar_t* source = channel + taps[t];
      float* lanes = unit + t * tap_step;
      if (n.pairs) {
        auto* halves = reinterpret_cast<c10::BFloat16*>(lanes) + i % 2;
        for (int64_t j = 0; j < filters; ++j) halves[2 * j] = source[filter[j]];
      } else if (neighbours) {
        std::copy_n(source + filter[0], filters, lanes);
      } else {
        for (int64_t j = 0; j < filters; ++j) lanes[j] = static_cast<float>(source[filter[j]]);
      }
    }
  }
}

// Of each listed channel `count` floats, side by side.
void copy_channels(const NativeCall& n, const float* from, int64_t count, float* to) {
  const auto copy = [&](auto length) {
    for (int64_t i = 0; i < n.kept_in; ++i, to += count) {
      std::memcpy(to, from + n.weight_channel(i) * count, length() * sizeof(float));
    }
  };
  // Whole vectors, whose length the compiler is to know.
  switch (count) {
    case 8:
      return copy([] { return 8; });
    case 16:
      return copy([] { return 16; });
    case 32:
      return copy([] { return 32; });
    default:
      return copy([count] { return count; });
  }
}

at::Tensor pack(const NativeCall& n, bool nchw) {
  const int64_t full = nchw ? n.tiles->rows : micro::kMaxVectors * n.tiles->lanes;
  const int64_t panels = (n.kept_out + full - 1) / full;
  const int64_t floats = ((panels - 1) * full + panel_width(n, nchw, panels - 1)) * n.depth;
  at::Tensor packed = at::empty({floats}, at::TensorOptions().dtype(at::kFloat));
  float* dst = packed.mutable_data_ptr<float>();
  std::vector<int64_t> taps(n.taps);
  for (int64_t t = 0; t < n.taps; ++t) taps[t] = t / n.kernel_w * n.w_stride_h + t % n.kernel_w * n.w_stride_w;
  // Small weights are packed sooner than a second thread wakes.
  const int64_t grain = std::max<int64_t>(1, kFloatsPerThread / (full * n.depth));
  const auto cycles = [&](int64_t p) { return pass_cycles(4 * panel_width(n, nchw, p) * n.depth); };
  parallel_tasks(panels, grain, cycles, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      if (n.bfloat16) {
        pack_panel<c10::BFloat16>(n, taps, nchw, p, dst + p * full * n.depth);
      } else {
        pack_panel<float>(n, taps, nchw, p, dst + p * full * n.depth);
      }
    }
  });
  return packed;
}

}  // namespace

PackedLayout packed_layout(const NativeCall& n, bool channels_last) {
  const bool nchw = !channels_last;
  const int64_t full = nchw ? n.tiles->rows : micro::kMaxVectors * n.tiles->lanes;
  const int64_t panels = (n.kept_out + full - 1) / full;
  return {panels, full, panel_width(n, nchw, panels - 1), nchw ? 1 : n.taps, nchw ? n.taps : 1};
}

at::Tensor listed_part(const NativeCall& n, const at::Tensor& all, int64_t channels, const PackedLayout& l) {
  const int64_t panel_steps = l.runs * n.kept_in * l.steps, filters = (l.panels - 1) * l.width + l.last_width;
  at::Tensor part = at::empty({filters * panel_steps}, all.options());
  const float* from = all.const_data_ptr<float>();
  float* to = part.mutable_data_ptr<float>();
  const int64_t grain = std::max<int64_t>(1, kFloatsPerThread / (l.width * panel_steps));
  const auto cycles = [&](int64_t) { return pass_cycles(l.width * panel_steps); };
  parallel_tasks(l.panels, grain, cycles, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t count = (p + 1 < l.panels ? l.width : l.last_width) * l.steps;
      const float* panel = from + p * l.width * l.runs * channels * l.steps;
      float* copy = to + p * l.width * panel_steps;
      for (int64_t run = 0; run < l.runs; ++run, panel += channels * count, copy += n.kept_in * count) {
        copy_channels(n, panel, count, copy);
      }
    }
  });
  return part;
}

at::Tensor pack_weight_nhwc(const NativeCall& n) { return pack(n, false); }
at::Tensor pack_weight_nchw(const NativeCall& n) { return pack(n, true); }

}  // namespace bap_kernels
