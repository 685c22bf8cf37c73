// Weights as the convolution by WGMMA copies them: in tiles of 128 columns x 128 bytes of depth at one tap, each of
// which lies in memory as a stage of shared memory wants it, chunks exchanged as by_rows puts them. So one bulk copy
// brings a tile. 16-bit elements.
//
// (ceil(columns / 128), taps, ceil(depth / 64) * elements of a tile); zeros where there is no column or no depth.
#pragma once

#include "backends/cuda/kernels/tile_layout.h"

namespace bap_kernels {

constexpr int kWeightTileColumns = 128, kWeightTileBytes = kWeightTileColumns * kDepthBytes;
constexpr int kWeightTileDepth = kDepthBytes / 2, kWeightTileElements = kWeightTileBytes / 2;

}  // namespace bap_kernels
