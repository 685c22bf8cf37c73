// Copies that fill a panel of pixels from a plane; see channel_rows.cpp. No torch header, as in tile.h.
#pragma once

#include <cstdint>

namespace bap_kernels::micro {

// Part of one row of the panel.
struct Copy {
  int64_t place, count;  // floats in the row; zeros where source < 0
  int64_t source;        // elements from the channel's plane in the first image
};

// Carries out `copies` from `plane`, whose neighbouring pixels are `step` floats apart, into `row`. Reads and writes
// nothing past either end of a copy.
void copy_runs_avx2(const Copy* copies, int64_t count, const float* plane, int64_t step, float* row);

// The same of bfloat16, given as its bits: one channel widened to floats, or two channels side by side in each lane of
// the row, the second in the upper half; zeros there where `second` is null.
void widen_runs_avx2(const Copy* copies, int64_t count, const uint16_t* plane, int64_t step, float* row);
void pair_runs_avx2(const Copy* copies, int64_t count, const uint16_t* first, const uint16_t* second, int64_t step,
                    float* row);

}  // namespace bap_kernels::micro
