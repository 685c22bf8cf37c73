// Integers of a private op, as the caller's struct and as the list that crosses the dispatcher. No torch header.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "backends/cuda/kernels/conv_params.h"

namespace bap_kernels {

// One axis: input, output, kernel, stride, padding before, dilation.
struct AxisOptions {
  int64_t input, output, kernel, stride, before, dilation;
  ConvAxis axis() const {
    return {static_cast<int>(input),  static_cast<int>(output), static_cast<int>(kernel),
            static_cast<int>(stride), static_cast<int>(before), static_cast<int>(dilation)};
  }
};

// Where the sources of the kernels lie: channels side by side, pixels side by side (1x1 kernels), or either with a
// halo.
enum class ConvRoute : int64_t { kRows, kPlanes, kHalo };

// One run of images: its list's block and length, its first image and their number; see BatchRun.
struct RunOptions {
  int64_t block, depth, first, images;
};

struct ConvOptions {
  AxisOptions h, w;
  int64_t result_block;  // see ListParams
  int64_t columns;
  int64_t route;                                                      // a ConvRoute
  int64_t gradient, full_width, relu, tf32, reduce_off, source_relu;  // 0 or 1
};

struct WeightGradientOptions {
  AxisOptions h, w;
  int64_t source_block;  // of the list by which `source` is read
  int64_t row_block, column_block;
  int64_t rows, columns;  // listed filters and input channels
  int64_t tf32;
};

struct PackOptions {
  int64_t relu;
};

// The list's block, see ListParams, and how many channels of the source it places.
struct UnpackOptions {
  int64_t block, depth;
};

template <class Options>
std::vector<int64_t> list_of(const Options& options) {
  static_assert(sizeof(Options) % sizeof(int64_t) == 0);
  std::vector<int64_t> list(sizeof(Options) / sizeof(int64_t));
  std::memcpy(list.data(), &options, sizeof(Options));
  return list;
}

// False where the list is not one of these options.
template <class Options>
bool options_of(const std::vector<int64_t>& list, Options& options) {
  if (list.size() * sizeof(int64_t) != sizeof(Options)) return false;
  std::memcpy(&options, list.data(), sizeof(Options));
  return true;
}

}  // namespace bap_kernels
