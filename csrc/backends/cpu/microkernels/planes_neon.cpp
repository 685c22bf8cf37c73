// The moves of planes.h as plain loops, which compilers vectorise.
#include "backends/cpu/microkernels/planes.h"

namespace bap_kernels::micro {

void planes_to_pixels(const float* const* planes, int64_t channels, int64_t count, float* pixels, int64_t step) {
  const int64_t padded = (channels + kPlaneChannels - 1) / kPlaneChannels * kPlaneChannels;
  for (int64_t p = 0; p < count; ++p) {
    float* out = pixels + p * step;
    for (int64_t c = 0; c < channels; ++c) out[c] = planes[c][p];
    for (int64_t c = channels; c < padded; ++c) out[c] = 0.f;
  }
}

void pixels_to_planes(const float* pixels, int64_t step, int64_t channels, int64_t count, float* planes,
                      int64_t plane_step, const float* residual, bool relu, float out_max) {
  for (int64_t c = 0; c < channels; ++c) {
    float* out = planes + c * plane_step;
    const float* other = residual != nullptr ? residual + c * plane_step : nullptr;
    for (int64_t p = 0; p < count; ++p) {
      float y = pixels[p * step + c];
      if (other != nullptr) y += other[p];
      out[p] = !relu ? y : y < 0.f ? 0.f : y > out_max ? out_max : y;  // NaN stays
    }
  }
}

}  // namespace bap_kernels::micro
