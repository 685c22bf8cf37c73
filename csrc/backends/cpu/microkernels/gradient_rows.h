// What becomes of computed input gradients; see input_gradient.cpp. No torch header, as in tile.h.
// Elements of x and dx are float, or bfloat16 as its bits.
#pragma once

#include <cstdint>

namespace bap_kernels::micro {

// One pixel, all channels side by side: dx[c] = part[c] & keep[c] and dots[c] += part[c] * x[c]. dx, keep and dots may
// be null.
void gradient_pixel(const float* part, const float* x, float* dx, const uint32_t* keep, float* dots, int64_t n);
void gradient_pixel(const float* part, const uint16_t* x, uint16_t* dx, const uint32_t* keep, float* dots, int64_t n);

// A run of one channel's pixels: dx = part where dx is given; returns the sum of part * x, or 0 without x. Steps in
// elements. The order of the sum is fixed.
float gradient_run(const float* part, const float* x, int64_t x_step, float* dx, int64_t dx_step, int64_t n);
float gradient_run(const float* part, const uint16_t* x, int64_t x_step, uint16_t* dx, int64_t dx_step, int64_t n);

// The same for a row whose even and odd pixels come from two parts of n and n_odd = n or n - 1 pixels; neighbouring
// pixels of x and dx are side by side.
float gradient_pairs(const float* even, const float* odd, const float* x, float* dx, int64_t n, int64_t n_odd);
float gradient_pairs(const float* even, const float* odd, const uint16_t* x, uint16_t* dx, int64_t n, int64_t n_odd);

}  // namespace bap_kernels::micro
