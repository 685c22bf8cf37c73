// Between planes of channels (NCHW) and pixels whose channels lie side by side, by transposing 8 x 8 values at a time.
// See conv_winograd.cpp. One source file per architecture,
// whose smallest instruction set serves every tile. No torch header, as in tile.h.
#pragma once

#include <cstdint>

namespace bap_kernels::micro {

constexpr int64_t kPlaneChannels = 8;

// pixels[p * step + c] = planes[c][p] for `channels` channels, and zeros up to the next multiple of kPlaneChannels.
void planes_to_pixels(const float* const* planes, int64_t channels, int64_t count, float* pixels, int64_t step);

// planes[c * plane_step + p] = relu?(pixels[p * step + c] + residual[c * plane_step + p]), at most out_max behind
// a ReLU. `residual` may be null.
// Precondition: `step` is a multiple of kPlaneChannels; what lies behind the last channel is read and not used.
void pixels_to_planes(const float* pixels, int64_t step, int64_t channels, int64_t count, float* planes,
                      int64_t plane_step, const float* residual, bool relu, float out_max);

}  // namespace bap_kernels::micro
