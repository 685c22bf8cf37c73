// NEON: a group of lanes at a time, in loops that the compiler vectorises. Nothing outside the masks is read.
#include "backends/cpu/microkernels/pack_row.h"

namespace bap_kernels::micro {
namespace {

struct Lanes {
  float v[kRowLanes];
};

inline float float_of(uint32_t bits) {
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}

inline uint32_t bits_of(float v) {
  uint32_t bits;
  __builtin_memcpy(&bits, &v, 4);
  return bits;
}

inline float to_float(float v) { return v; }
// A bfloat16 is the upper half of its float.
inline float to_float(uint16_t v) { return float_of(static_cast<uint32_t>(v) << 16); }

// Round to nearest even; NaN stays NaN. The upper half is the bfloat16.
inline uint32_t rounded(float v) {
  const uint32_t bits = bits_of(v);
  return v != v ? 0x7fc0u : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// A NaN stays one.
inline float applied(const RowPrologue& f, float v) {
  v = __builtin_fmaf(v, f.scale, f.shift);
  return f.relu && v < 0.f ? 0.f : v;
}

// `element(place)` is the lane's value at that place of the plane.
template <class Element>
inline Lanes gather(int64_t source, int32_t mask, int64_t step, const Element& element) {
  Lanes lanes = {};
  if (mask == kAllLanes) {
    for (int64_t l = 0; l < kRowLanes; ++l) lanes.v[l] = element(source + l * step);
  } else {
    for (int64_t l = 0; l < kRowLanes; ++l) {
      if (mask >> l & 1) lanes.v[l] = element(source + l * step);
    }
  }
  return lanes;
}

template <class Element>
inline void pack(const RowPart* parts, int64_t count, int64_t step, float* row, const Element& element) {
  Lanes lanes = {};
  for (const RowPart* part = parts; part != parts + count; ++part) {
    if (part->mask == kAllLanes) {
      for (int32_t g = 0; g < part->groups; ++g, row += kRowLanes) {
        const Lanes group = gather(part->source + g * kRowLanes * step, kAllLanes, step, element);
        __builtin_memcpy(row, group.v, sizeof group.v);
      }
      continue;
    }
    const Lanes some = gather(part->source, part->mask, step, element);
    for (int64_t l = 0; l < kRowLanes; ++l) {
      if (part->mask >> l & 1) lanes.v[l] = some.v[l];
    }
    if (part->groups == 0) continue;
    __builtin_memcpy(row, lanes.v, sizeof lanes.v);
    row += kRowLanes;
    lanes = {};
  }
}

template <class T>
inline void pack_plane(const RowPart* parts, int64_t count, const T* plane, int64_t step, const RowPrologue* prologue,
                       float* row) {
  if (prologue) {
    const RowPrologue f = *prologue;
    pack(parts, count, step, row, [=](int64_t place) { return applied(f, to_float(plane[place])); });
  } else if (step == 1) {
    pack(parts, count, 1, row, [=](int64_t place) { return to_float(plane[place]); });
  } else {
    pack(parts, count, step, row, [=](int64_t place) { return to_float(plane[place]); });
  }
}

}  // namespace

void pack_row(const RowPart* parts, int64_t count, const float* plane, int64_t step, const RowPrologue* prologue,
              float* row) {
  pack_plane(parts, count, plane, step, prologue, row);
}

void pack_row(const RowPart* parts, int64_t count, const uint16_t* plane, int64_t step, const RowPrologue* prologue,
              float* row) {
  pack_plane(parts, count, plane, step, prologue, row);
}

void pack_pairs(const RowPart* parts, int64_t count, const uint16_t* first, const uint16_t* second, int64_t step,
                const RowPrologue* prologues, float* row) {
  const auto half = [=](const uint16_t* plane, const RowPrologue* prologue, int64_t place) {
    return prologue ? rounded(applied(*prologue, to_float(plane[place]))) : static_cast<uint32_t>(plane[place]);
  };
  pack(parts, count, step, row, [=](int64_t place) {
    uint32_t lanes = half(first, prologues, place);
    if (second) lanes |= half(second, prologues ? prologues + 1 : nullptr, place) << 16;
    return float_of(lanes);
  });
}

}  // namespace bap_kernels::micro
