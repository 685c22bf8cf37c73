// Parameters of the convolution kernels. Sizes are elements, strides are in elements, pointers may be null where so
// said.
#pragma once

#include "backends/cuda/kernels/conv_geometry.h"

namespace bap_kernels {

struct Strides {
  int64_t n, c, h, w;
};

// A list as kernels take it. `block` 0: all channels, no list, and `entries` is null; else entries of `block`
// neighbouring channels, of which each starts at a multiple of `block`, which is 2^shift. A list of single channels has
// block 1.
struct ListParams {
  const int32_t* entries;
  int block, shift;
};
// The channel at place k of a list.
BAP_HOST_DEVICE int listed_channel(const ListParams& list, int k) {
  if (list.block == 0) return k;
  return (list.entries[k >> list.shift] << list.shift) + (k & (list.block - 1));
}

// A per-channel vector, of float32 or of the elements' type; may be null.
struct VectorParams {
  const void* values;
  bool is_float;
};

// Neighbouring images of a batch that read the same list; the images of a mixed batch come as several runs.
struct BatchRun {
  // (columns, taps, depth rounded up): packed, depth contiguous. By WGMMA in tiles (weight_tiles.h), and then the first
  // stride is that from a tile's columns to the next ones.
  const void* weight;
  int64_t stride_weight_column, stride_weight_tap;
  ListParams list;  // of the source's channels
  int depth;        // how many of them are summed over
  int first, images;
};

// The runs of one launch, in the order of its blocks: those with the most work for each block first.
constexpr int kMaxRuns = 16;
struct Runs {
  BatchRun of[kMaxRuns];
  int count;
};

// Which run the image with this number in the launch's order belongs to, and its number in the batch.
struct ImagePlace {
  int run, image;
};
BAP_HOST_DEVICE ImagePlace image_place(const Runs& runs, int number) {
  int run = 0;
  while (run + 1 < runs.count && number >= runs.of[run].images) number -= runs.of[run++].images;
  return {run, runs.of[run].first + number};
}

// Phases of the input's gradient along an axis in one launch.
constexpr int kMaxPhases = 8;

// The steps of a long sum cut into parts, which blocks of their own add up; split_epilogue.cu adds the parts.
struct PartialSums {
  float* sums;  // (parts, phases, pixels of the batch, columns rounded up to 4); null: there is one part
  Divisor count;
  int64_t stride_part, stride_phase;
  int stride_row;
};

// The implicit GEMM of the forward, and of the input's gradient with the roles of the channels exchanged.
struct ConvParams {
  const void* source;  // what is summed over: (N, depth, H, W)
  void* result;        // null: only `partial` is wanted
  Strides source_stride, result_stride;
  Runs runs;
  ListParams result_list;  // of the columns' channels, for the bias and for results of full width
  bool full_width;         // whether columns are stored at their channels, others left alone
  const int32_t* depth;    // on the device: how much of the runs' depth is used; null: all
  const int32_t* stored;   // on the device: how many columns are stored; null: all
  int batch, columns;
  bool gradient;
  ConvAxis axis_h, axis_w;
  int kernel_w;
  // Of the axes, for the phases of this launch: the forward has one.
  AxisPlan plans_h[kMaxPhases], plans_w[kMaxPhases];
  int phases_h, phases_w;
  int first_phase_h, first_phase_w;  // their numbers
  int pixels;                        // of an image that a grid has tiles for: those of the largest phase
  Divisor column_tiles;              // of the launch's tile
  PartialSums parts;
  // x' = relu?(source_scale * x + source_shift) is summed over, where it lies within the source; with a halo only.
  VectorParams source_scale, source_shift;
  bool source_relu;
  // y = relu?(scale * (sum + bias) + shift + residual)
  VectorParams bias, scale, shift;
  const void* residual;
  Strides residual_stride;
  bool relu;
  bool result_vector, residual_vector;  // whether 16 bytes of it may be stored or loaded at once
  // A second store of some columns: column copy_list[i] is channel i of the copy. Null: none.
  void* copy;
  Strides copy_stride;
  const int32_t* copy_list;  // (copied,), different columns in any order
  int copied;
  bool copy_vector;  // as result_vector
  // Terms of a switch's gradient, one row for each row tile of each phase: sum over the tile's rows of input * result.
  float* partial;
  const void* input;
  Strides input_stride;
  bool reduce_off;  // whether columns that are not stored are reduced too
};

// The weight's gradient, split over chunks of the result's pixels.
struct WeightGradientParams {
  const void* grad;    // (N, rows, oH, oW), channels contiguous
  const void* source;  // (N, columns, H, W), channels contiguous
  float* partial;      // (chunks, rows, taps, columns)
  Strides grad_stride, source_stride;
  ListParams source_list;
  const int32_t* used;  // on the device: how many columns are computed; null: all
  int batch, rows, columns;
  int pixels_per_chunk;
  ConvAxis axis_h, axis_w;
  Divisor out_h, out_w, taps, kernel_w;
  Divisor column_tiles;  // of the launch's tile
};

// Sums over chunks, put at the listed places of a gradient.
struct SumPartialsParams {
  const float* partial;
  void* result;
  int64_t stride_chunk, stride_row, stride_tap;
  Strides result_stride;  // n: rows, c: columns
  ListParams row_list, column_list;
  const int32_t* used;
  int chunks, rows, taps, kernel_w, columns;
  bool result_is_float;
};

// A weight's listed slices in tiles; see weight_tiles.h.
struct WeightTilesParams {
  const void* weight;  // 16-bit elements
  void* result;
  int64_t stride_column, stride_depth, stride_h, stride_w;  // of the weight
  ListParams column_list, depth_list;
  const int32_t* used;  // on the device: how much of the depth is there, zeros behind it; null: all
  int columns, depth, taps;
  Divisor kernel_w, blocks;  // of depth
};

// A compact copy of listed channels, in NHWC.
struct ChannelPackParams {
  const void* source;  // (N, C, H, W), any strides
  void* result;        // dense (N, H, W, padded)
  Strides source_stride;
  Runs runs;            // without weights
  const int32_t* used;  // on the device: how many of the runs' depth are copied; null: all
  int batch, height, padded;
  Divisor width;
  VectorParams scale, shift;
  bool relu;
  bool channel_vector;    // whether 16 bytes of the source's listed channels may be loaded at once
  bool pixel_vector;      // whether 16 bytes of its pixels may be
  Divisor channel_tiles;  // filled in by the launch
};

// A compact NHWC tensor spread over the listed channels of another one, zeros in the channels between them.
struct ChannelUnpackParams {
  const void* source;  // dense (N, H, W, padded)
  void* result;        // (N, channels, H, W)
  Strides result_stride;
  ListParams list;      // where each channel of the source goes; without a list those of the same number
  int depth;            // channels of the source
  const int32_t* used;  // on the device: how many of them are there, the others are zeros; null: all
  int batch, height, width, padded, channels;
  bool result_vector;     // whether 16 bytes of pixels may be stored at once
  Divisor channel_tiles;  // filled in by the launch
};

}  // namespace bap_kernels
