// A call prepared for the native kernels: geometry in element strides, listed channels, folded epilogue.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <functional>
#include <vector>

#include "backends/cpu/microkernels/tile.h"
#include "backends/cpu/tasks.h"
#include "ops/conv_call.h"

namespace bap_kernels {

inline int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }
inline int64_t round_up(int64_t n, int64_t multiple) { return ceil_div(n, multiple) * multiple; }

// Most steps of the reduction in one pass over the weights: a weight panel of this depth stays in the L1 cache.
constexpr int64_t kReductionBlock = 320;

// Steps of each pass when `depth` steps, `grain` at a time, are shared out evenly: a short last pass would cost as much
// around its loops as in them.
inline int64_t reduction_block(int64_t depth, int64_t grain) {
  const int64_t passes = std::max<int64_t>(1, (depth + kReductionBlock - 1) / kReductionBlock);
  const int64_t grains = (depth + grain - 1) / grain;
  return (grains + passes - 1) / passes * grain;
}

struct NativeCall {
  const micro::KernelTable* tiles;
  bool bfloat16;        // element type of input and weight; else float
  bool out_bfloat16;    // element type of result and residual; else float
  bool pairs;           // two channels in each 32-bit lane, multiplied by the *_pairs tiles
  int64_t units;        // listed input channels in lanes: kept_in, or half of it rounded up
  int64_t taps, depth;  // depth = units * taps

  // Input: strides in elements. A 1x1 convolution over whole planes is seen as one row of H * W pixels.
  const char* x;
  int64_t height, width, x_stride_n, x_stride_c, x_stride_h, x_stride_w;
  int64_t kernel_w, stride_h, stride_w, dilation_h, dilation_w, pad_top, pad_left;
  int64_t batch, out_h, out_w, kept_in, kept_out, channels_in;
  const int32_t* in_index;   // null: all
  const int32_t* out_index;  // null: all

  // Weight: strides in elements, those of the taps may be negative.
  const char* w;
  int64_t w_stride_out, w_stride_in, w_stride_h, w_stride_w;
  const int32_t* weight_index;  // its channels where the input's are numbered otherwise; null: as in_index

  // Prologue on listed channels; null where absent.
  const float* in_scale;
  const float* in_shift;
  bool in_relu;
  bool has_prologue;

  // Epilogue: y = min(relu(scale * sum + shift + residual), out_max), the bias folded into shift; without the ReLU
  // there is no largest result either. Padded to whole tiles.
  std::vector<float> scale, shift;
  const char* residual;  // same strides as y, but for the bytes from pixel to pixel of channels_last
  int64_t residual_pixel;
  bool out_relu;
  float out_max;

  char* y;  // contiguous in the call's memory format
  int threads;
  // Of Winograd calls: where in x and y each image lies, counted in images; empty: one after the other.
  std::vector<int64_t> images;

  std::vector<at::Tensor> keep_alive;

  int64_t element_size() const { return bfloat16 ? 2 : 4; }
  int64_t out_size() const { return out_bfloat16 ? 2 : 4; }
  int64_t pixels() const { return batch * out_h * out_w; }
  int64_t channel(int64_t i) const { return in_index ? in_index[i] : i; }
  int64_t image(int64_t i) const { return images.empty() ? i : images[i]; }
  int64_t weight_channel(int64_t i) const { return weight_index ? weight_index[i] : channel(i); }
  // The same with all channels of a weight, for packing.
  NativeCall over_all_channels(int64_t channels) const {
    NativeCall all = *this;
    all.in_index = all.weight_index = nullptr;
    all.kept_in = all.units = channels;
    all.depth = channels * taps;
    return all;
  }
  const char* pixel(int64_t n, int64_t ih, int64_t iw) const {
    return x + (n * x_stride_n + ih * x_stride_h + iw * x_stride_w) * element_size();
  }
};

// The part that both directions have in common: arithmetic, source, and a kernel of `kernel` taps over `kept_in` of its
// channels. Steps of one pixel, no padding, and a result that is not there yet.
NativeCall native_source(const at::Tensor& source, int64_t kept_in, std::array<int64_t, 2> kernel);

// Where every pixel of the result meets its own pixel of the source and no other, and rows follow each other without a
// gap: makes one row of them all.
void join_rows(NativeCall& native);

// Fills in everything; `result` is allocated in the call's memory format, unless it comes as a place to write to.
NativeCall prepare_native(const ConvCall& call, at::Tensor& result);

// Packed weights, [panel][reduction step][lane or row] in 32-bit lanes; see pack_weights.cpp for the two orders.
at::Tensor pack_weight_nhwc(const NativeCall& native);
at::Tensor pack_weight_nchw(const NativeCall& native);

// The work of one call, cut into tasks that may run in any order, at once or not.
struct NativeTasks {
  int64_t count;
  std::function<void(int64_t)> run;
  std::function<double(int64_t)> cycles;  // estimated; only while tasks are recorded
};

// Those of a grid over `tiles` of `tile_pixels` pixels and `panels` of `panel_filters` filters:
// run(first pixel, last pixel, first panel, last panel).
template <class Run>
NativeTasks grid_tasks(const NativeCall& n, const TaskGrid& grid, int64_t tiles, int64_t panels, int64_t tile_pixels,
                       int64_t panel_filters, Run run) {
  const auto with_part = [=, pixels = n.pixels()](int64_t task, const auto& use) {
    const int64_t block = task / grid.channel_groups, group = task % grid.channel_groups;
    return use(block * tiles / grid.pixel_blocks * tile_pixels,
               std::min(pixels, (block + 1) * tiles / grid.pixel_blocks * tile_pixels),
               group * panels / grid.channel_groups, (group + 1) * panels / grid.channel_groups);
  };
  NativeTasks tasks{grid.tasks(), [=](int64_t task) { with_part(task, run); }, {}};
  if (TaskRecord::current() == nullptr) return tasks;
  tasks.cycles = [=, filters = n.kept_out, steps = n.depth](int64_t task) {
    return with_part(task, [&](int64_t begin, int64_t end, int64_t first_panel, int64_t last_panel) {
      const int64_t last = std::min(filters, last_panel * panel_filters);
      return direct_cycles(end - begin, last - first_panel * panel_filters, steps);
    });
  };
  return tasks;
}

// What computes results [begin, end) of a call by the calling thread: all filters of pixels, or of rows, counted
// through the batch. It refers to the call, whose pointers may move between its runs.
using RangeRun = std::function<void(int64_t begin, int64_t end)>;
RangeRun conv_nhwc_pixels(const NativeCall& native, const float* weight);

// The two drivers: channels_last results, and contiguous results. Tasks refer to the arguments.
NativeTasks conv_nhwc_tasks(const NativeCall& native, const float* weight);
NativeTasks conv_nchw_tasks(const NativeCall& native, const float* weight);

// The call's weight as its driver wants it, from the cache where the call asks for that.
at::Tensor packed_weight(const ConvCall& call, const NativeCall& native);

// How a packed weight is laid out: panels of `width` filters, the last one of `last_width`; in each of them
// [run][channel][step][filter].
struct PackedLayout {
  int64_t panels, width, last_width, runs, steps;
};
PackedLayout packed_layout(const NativeCall& native, bool channels_last);

// From a weight that was packed with all `channels`, what packing the listed ones would give.
at::Tensor listed_part(const NativeCall& native, const at::Tensor& all, int64_t channels, const PackedLayout& layout);

// Runs tasks on all threads.
void run_tasks(const NativeTasks& tasks);

// Runs the driver of channels_last results, or that of contiguous ones, on all threads.
void run_driver(const NativeCall& native, const at::Tensor& weight, bool channels_last);

}  // namespace bap_kernels
