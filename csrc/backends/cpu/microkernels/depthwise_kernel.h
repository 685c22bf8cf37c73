// Depthwise convolutions and poolings, written once for every vector width: each row of accumulators has its own
// inputs, and a tap's weight serves all of them.
//   acc[r][lane] = sum over taps of weight(tap, lane) * x(r, tap, lane);  y = min(relu(acc * scale + shift + residual),
//   out_max)
// or with the largest of x in place of the sum, or with weights of 1: see TapOp.
// Included by one source file per instruction set behind simd.h, inside that file's own anonymous namespace.
// Accumulates in fp32, taps in order: a result depends on the call alone, never on its place in a tile.

// With two vectors each, enough independent sums to hide the latency of two multiply-adds a cycle.
constexpr int kDepthwiseRows = 6;

template <int kLanes>
inline __attribute__((always_inline)) auto load_floats(const float* p, int count) {
  return count < kLanes ? load_part<kLanes>(p, count) : Simd<kLanes, false>::load(p);
}

template <int kLanes>
inline __attribute__((always_inline)) auto load_floats(const uint16_t* p, int count) {
  using S = Simd<kLanes, false>;
  return S::from_bfloat16(count < kLanes ? load_part<kLanes>(p, count) : S::load(p));
}

template <int kLanes, class Vec>
inline __attribute__((always_inline)) void store_floats(float* p, Vec v, int count) {
  count < kLanes ? store_part<kLanes>(p, v, count) : Simd<kLanes, false>::store(p, v);
}

template <int kLanes, class Vec>
inline __attribute__((always_inline)) void store_floats(uint16_t* p, Vec v, int count) {
  using S = Simd<kLanes, false>;
  const auto halves = S::to_bfloat16(v);
  count < kLanes ? store_part<kLanes>(p, halves, count) : S::store(p, halves);
}

// kRows rows, kVectors vectors from `lane` on; `count` of the last vector's lanes exist. The others are read in planes,
// where the driver has put zeros, and not in pixels. They are written, with anything, where `later` says that the
// result holds them and that whoever calls writes them afterwards.
template <int kLanes, TapOp kOp, bool kPixels, class In, class Out, int kRows, int kVectors>
inline __attribute__((always_inline)) void depthwise_tile(const DepthwiseArgs& t, int64_t row, int64_t lane, int count,
                                                          bool later) {
  using S = Simd<kLanes, false>;
  using Vec = typename S::Vec;
  Vec acc[kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) acc[r][v] = S::broadcast(kOp == TapOp::kMax ? -__builtin_inff() : 0.f);
  }
  const In* x = static_cast<const In*>(t.x) + row * t.x_step + lane;
  const auto weight = [&](int64_t tap, int v) __attribute__((always_inline)) {
    if constexpr (!kPixels) return S::broadcast(t.weight[tap]);
    return S::load(t.weight + (lane + v * kLanes) * t.taps_of_weight + tap * kLanes);
  };
  for (const DepthwiseTap *tap = t.taps, *end = tap + t.tap_count; tap != end; ++tap) {
    const In* of_tap = x + tap->offset;
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      Vec b{};
      if constexpr (kOp == TapOp::kFilter) b = weight(tap->number, v);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const Vec value =
            load_floats<kLanes>(of_tap + r * t.x_step + v * kLanes, kPixels && v + 1 == kVectors ? count : kLanes);
        if constexpr (kOp == TapOp::kFilter) {
          acc[r][v] += b * value;
        } else if constexpr (kOp == TapOp::kSum) {
          acc[r][v] += value;
        } else {
          acc[r][v] = (value > acc[r][v]) | (value != value) ? value : acc[r][v];
        }
      }
    }
  }
  const int64_t out_step = t.out_step, residual_step = t.residual_step;
  Out* out = static_cast<Out*>(t.out) + row * out_step + lane;
  const Out* residual = t.residual ? static_cast<const Out*>(t.residual) + row * residual_step + lane : nullptr;
  const Vec least = S::broadcast(t.relu ? 0.f : -__builtin_inff());
  const Vec most = S::broadcast(t.relu ? t.out_max : __builtin_inff());
  const int64_t of_lane = kPixels ? lane : 0;
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    Vec scale = S::broadcast(1.f), shift{};
    if (t.scale) scale = kPixels ? S::load(t.scale + of_lane + v * kLanes) : S::broadcast(*t.scale);
    if (t.shift) shift = kPixels ? S::load(t.shift + of_lane + v * kLanes) : S::broadcast(*t.shift);
    const int exist = v + 1 < kVectors ? kLanes : count;
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      Vec y = acc[r][v] * scale + shift;
      if (residual) y += load_floats<kLanes>(residual + r * residual_step + v * kLanes, exist);
      // NaN stays.
      y = y < least ? least : y;
      y = y > most ? most : y;
      const bool whole = later && (t.rows - row - r) * out_step - lane >= (v + 1) * kLanes;
      store_floats<kLanes>(out + r * out_step + v * kLanes, y, whole ? kLanes : exist);
    }
  }
}

// A vector that is cut short comes first: where rows follow each other without a gap, what it writes too much is
// overwritten by the next row. To write a part of a vector is slow.
template <int kLanes, TapOp kOp, bool kPixels, class In, class Out, int kRows>
inline __attribute__((always_inline)) void depthwise_rows(const DepthwiseArgs& t, int64_t row) {
  const int64_t cut = t.lanes % kLanes, whole = t.lanes - cut;
  if (cut) {
    depthwise_tile<kLanes, kOp, kPixels, In, Out, kRows, 1>(t, row, whole, static_cast<int>(cut),
                                                            t.out_step == t.lanes);
  }
  int64_t lane = 0;
  for (; whole - lane >= 2 * kLanes; lane += 2 * kLanes) {
    depthwise_tile<kLanes, kOp, kPixels, In, Out, kRows, 2>(t, row, lane, kLanes, false);
  }
  if (lane < whole) depthwise_tile<kLanes, kOp, kPixels, In, Out, kRows, 1>(t, row, lane, kLanes, false);
}

template <int kLanes, TapOp kOp, bool kPixels, class In, class Out>
void depthwise_kernel(const DepthwiseArgs& t) {
  int64_t row = 0;
  for (; t.rows - row >= kDepthwiseRows; row += kDepthwiseRows) {
    depthwise_rows<kLanes, kOp, kPixels, In, Out, kDepthwiseRows>(t, row);
  }
  for (; t.rows - row >= 3; row += 3) depthwise_rows<kLanes, kOp, kPixels, In, Out, 3>(t, row);
  for (; row < t.rows; ++row) depthwise_rows<kLanes, kOp, kPixels, In, Out, 1>(t, row);
}

// The even elements of two vectors, one after the other.
template <int kLanes, class Vec>
inline __attribute__((always_inline)) Vec evens(Vec a, Vec b) {
  if constexpr (kLanes == 4) {
    return __builtin_shufflevector(a, b, 0, 2, 4, 6);
  } else if constexpr (kLanes == 8) {
    return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
  } else {
    return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  }
}

inline float float_of(float v) { return v; }
inline float float_of(uint16_t v) {
  const uint32_t bits = static_cast<uint32_t>(v) << 16;
  float f;
  __builtin_memcpy(&f, &bits, sizeof f);
  return f;
}

// Elements [first, last) of a phase that begins `before` elements of its stride ahead of the row: those inside of it.
template <int kLanes, class In>
inline __attribute__((always_inline)) void copy_phase(const DepthwisePhases& t, const In* in, float* out,
                                                      int64_t before, int64_t first, int64_t last) {
  using S = Simd<kLanes, false>;
  using Vec = typename S::Vec;
  for (int64_t i = 0; i < first; ++i) out[i] = t.fill;
  int64_t i = first;
  if (t.in_step == 1 && t.stride <= 2) {
    for (; i < last; i += kLanes) {
      const int64_t place = i * t.stride - before, left = t.width - place, more = left - kLanes;
      const Vec low = load_floats<kLanes>(in + place, static_cast<int>(left < kLanes ? left : kLanes));
      if (t.stride == 1) {
        S::store(out + i, low);
        continue;
      }
      Vec high{};
      if (more > 0) high = load_floats<kLanes>(in + place + kLanes, static_cast<int>(more < kLanes ? more : kLanes));
      S::store(out + i, evens<kLanes>(low, high));
    }
  }
  for (; i < last; ++i) out[i] = float_of(in[(i * t.stride - before) * t.in_step]);
  for (i = last; i < t.length; ++i) out[i] = t.fill;
}

template <int kLanes, class In>
void depthwise_phases(const DepthwisePhases& t) {
  for (int64_t row = 0; row < t.rows; ++row) {
    const In* in = static_cast<const In*>(t.in) + row * t.in_row_step;
    for (int64_t phase = 0; phase < t.stride; ++phase) {
      const int64_t before = t.pad - phase;
      int64_t first = before <= 0 ? 0 : (before + t.stride - 1) / t.stride;
      int64_t last = t.width + before <= 0 ? 0 : (t.width + before - 1) / t.stride + 1;
      first = first < t.length ? first : t.length;
      last = last < first ? first : last < t.length ? last : t.length;
      copy_phase<kLanes>(t, in, t.out + row * t.row_step + phase * t.phase_step, before, first, last);
    }
  }
}

template <int kLanes, TapOp kOp>
constexpr void fill_tap_op(DepthwiseTable& table) {
  constexpr int op = static_cast<int>(kOp);
  table.pixels[op][0] = depthwise_kernel<kLanes, kOp, true, float, float>;
  table.pixels[op][1] = depthwise_kernel<kLanes, kOp, true, uint16_t, uint16_t>;
  table.planes[op][0] = depthwise_kernel<kLanes, kOp, false, float, float>;
  table.planes[op][1] = depthwise_kernel<kLanes, kOp, false, float, uint16_t>;
}

template <int kLanes>
constexpr DepthwiseTable make_depthwise_table() {
  DepthwiseTable table{};
  table.lanes = kLanes;
  fill_tap_op<kLanes, TapOp::kFilter>(table);
  fill_tap_op<kLanes, TapOp::kMax>(table);
  fill_tap_op<kLanes, TapOp::kSum>(table);
  table.phases[0] = depthwise_phases<kLanes, float>;
  table.phases[1] = depthwise_phases<kLanes, uint16_t>;
  return table;
}
