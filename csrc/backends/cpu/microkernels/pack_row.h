// Fills one row of a panel of pixels from a plane; see conv_nchw.cpp. One source file per architecture, whose smallest
// instruction set serves every tile. No torch header, as in tile.h.
#pragma once

#include <cstdint>

namespace bap_kernels::micro {

constexpr int64_t kRowLanes = 8;

constexpr int32_t kAllLanes = (1 << kRowLanes) - 1;

// Lanes of one group of kRowLanes neighbouring floats of the row: lane l holds element source + l * step of the plane
// where bit l of the mask is set. A group's parts follow each other; what no part sets is zero.
struct RowPart {
  int64_t source;
  int32_t mask;
  int32_t groups;  // that end here: 0 or 1, or with all lanes any number of groups that go on in the plane
};

// What becomes of an element on its way; zeros of the padding stay zeros.
struct RowPrologue {
  float scale, shift;
  bool relu;
};

// Carries out `parts` from `plane`, whose neighbouring pixels are `step` elements apart. Elements outside the masks are
// not read. `prologue` may be null.
void pack_row(const RowPart* parts, int64_t count, const float* plane, int64_t step, const RowPrologue* prologue,
              float* row);

// The same of bfloat16, given as its bits, widened to floats.
void pack_row(const RowPart* parts, int64_t count, const uint16_t* plane, int64_t step, const RowPrologue* prologue,
              float* row);

// Two channels of bfloat16 side by side in each lane of the row, the second in the upper half; zeros there where
// `second` is null. With prologues, which come for both channels, values are rounded to nearest even.
void pack_pairs(const RowPart* parts, int64_t count, const uint16_t* first, const uint16_t* second, int64_t step,
                const RowPrologue* prologues, float* row);

}  // namespace bap_kernels::micro
