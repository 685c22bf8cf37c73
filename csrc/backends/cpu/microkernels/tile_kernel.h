// The register tile of the gathered convolution, written once for every vector width.
//   acc[r][lane] = sum over k of broadcast(r, k) * vector(k, lane);  y = min(relu(acc * scale + shift + residual),
//   out_max)
// conv_nhwc broadcasts activations, found through a pixel pointer plus a channel offset: the gather is one extra
// load per step. conv_nchw broadcasts packed weights and reads activations as whole vectors.
// Included by one source file per instruction set, inside that file's own anonymous namespace.
// Accumulates in fp32. The order of the sum depends on the reduction alone, never on the tile's place or the threads.

// Spelt out for each width: where a vector's size depends on a template argument, GCC takes its type for a scalar.
template <int kLanes>
struct Vectors;

template <>
struct Vectors<4> {
  typedef float Vec __attribute__((vector_size(16)));
  typedef float LooseVec __attribute__((vector_size(16), aligned(4), may_alias));
  typedef uint32_t Bits __attribute__((vector_size(16)));
  typedef uint16_t Halves __attribute__((vector_size(8)));
  typedef uint16_t LooseHalves __attribute__((vector_size(8), aligned(2), may_alias));
};

template <>
struct Vectors<8> {
  typedef float Vec __attribute__((vector_size(32)));
  typedef float LooseVec __attribute__((vector_size(32), aligned(4), may_alias));
  typedef uint32_t Bits __attribute__((vector_size(32)));
  typedef uint16_t Halves __attribute__((vector_size(16)));
  typedef uint16_t LooseHalves __attribute__((vector_size(16), aligned(2), may_alias));
};

template <>
struct Vectors<16> {
  typedef float Vec __attribute__((vector_size(64)));
  typedef float LooseVec __attribute__((vector_size(64), aligned(4), may_alias));
  typedef uint32_t Bits __attribute__((vector_size(64)));
  typedef uint16_t Halves __attribute__((vector_size(32)));
  typedef uint16_t LooseHalves __attribute__((vector_size(32), aligned(2), may_alias));
};

template <int kLanes, bool kPairs>
struct Simd : Vectors<kLanes> {
  using typename Vectors<kLanes>::Vec;
  using typename Vectors<kLanes>::LooseVec;
  using typename Vectors<kLanes>::Bits;
  using typename Vectors<kLanes>::Halves;
  using typename Vectors<kLanes>::LooseHalves;

  static inline __attribute__((always_inline)) Vec load(const float* p) {
    return *reinterpret_cast<const LooseVec*>(p);
  }
  static inline __attribute__((always_inline)) void store(float* p, Vec v) { *reinterpret_cast<LooseVec*>(p) = v; }
  static inline __attribute__((always_inline)) Halves load(const uint16_t* p) {
    return *reinterpret_cast<const LooseHalves*>(p);
  }
  static inline __attribute__((always_inline)) void store(uint16_t* p, Halves v) {
    *reinterpret_cast<LooseHalves*>(p) = v;
  }

  static inline __attribute__((always_inline)) Vec from_bfloat16(Halves v) {
    return (Vec)(__builtin_convertvector(v, Bits) << 16);
  }
  // Round to nearest even; NaN stays NaN. AVX512_BF16 takes denormal numbers for zero, as its products do.
  static inline __attribute__((always_inline)) Halves to_bfloat16(Vec v) {
#if defined(__AVX512BF16__)
    if constexpr (kLanes == 16) return (Halves)_mm512_cvtneps_pbh((__m512)v);
#endif
    const Bits bits = (Bits)v;
    const Bits rounded = bits + 0x7fff + ((bits >> 16) & 1);
    return __builtin_convertvector((v == v ? rounded : bits | 0x400000u) >> 16, Halves);
  }

  // x - 0 is x for every x, so this is a plain broadcast.
  static inline __attribute__((always_inline)) Vec broadcast(float s) { return s - Vec{}; }

  static inline __attribute__((always_inline)) void add_product(Vec& acc, Vec a, Vec b) {
    if constexpr (!kPairs) {
      acc += a * b;
    } else {
#if defined(__AVX512BF16__)
      if constexpr (kLanes == 16) {
        acc = (Vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
        return;
      }
#endif
      const Bits ua = (Bits)a, ub = (Bits)b;
      acc += (Vec)(ua << 16) * (Vec)(ub << 16);
      acc += (Vec)(ua & 0xffff0000u) * (Vec)(ub & 0xffff0000u);
    }
  }
};

// What moves from tile to tile.
struct Place {
  const float* weight;
  const float* const* source;
  float* partial;
  const float* scale;
  const float* shift;
  char* out;
  const char* residual;
  const char* ahead;
};

// The first `count` < kLanes elements at p, zeros behind them, and their counterpart; nothing past them is touched.
template <int kLanes, class element_t>
inline auto load_part(const element_t* p, int count) {
  using S = Simd<kLanes, false>;
#if defined(__AVX512BW__)
  if constexpr (kLanes == 16) {
    const auto mask = static_cast<uint16_t>((1u << count) - 1);
    if constexpr (sizeof(element_t) == 4) {
      return (typename S::Vec)_mm512_maskz_loadu_ps(mask, p);
    } else {
      return (typename S::Halves)_mm256_maskz_loadu_epi16(mask, p);
    }
  }
#endif
#if defined(__AVX2__)
  if constexpr (kLanes == 8 && sizeof(element_t) == 4) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return (typename S::Vec)_mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lanes));
  }
#endif
  alignas(64) element_t part[kLanes] = {};
  for (int i = 0; i < count; ++i) part[i] = p[i];
  return S::load(part);
}

// Whether part of a vector is loaded and stored as fast as all of it.
#if defined(__AVX512BW__)
template <int kLanes>
constexpr bool kMasks = kLanes == 16;
#else
template <int kLanes>
constexpr bool kMasks = false;
#endif

template <int kLanes, class element_t, class vector_t>
inline void store_part(element_t* p, vector_t v, int count) {
#if defined(__AVX512BW__)
  if constexpr (kLanes == 16) {
    const auto mask = static_cast<uint16_t>(count < kLanes ? (1u << count) - 1 : 0xffff);
    if constexpr (sizeof(element_t) == 4) {
      _mm512_mask_storeu_ps(p, mask, (__m512)v);
    } else {
      _mm256_mask_storeu_epi16(p, mask, (__m256i)v);
    }
    return;
  }
#endif
  alignas(64) element_t part[kLanes];
  Simd<kLanes, false>::store(part, v);
  for (int i = 0; i < count; ++i) p[i] = part[i];
}

// The first `count` of two vectors' results at p, rounded to bfloat16.
template <int kLanes, class Vec>
inline __attribute__((always_inline)) void store_bfloat16(uint16_t* p, Vec first, Vec second, int count) {
  using S = Simd<kLanes, false>;
#if defined(__AVX512BF16__)
  if constexpr (kLanes == 16) {
    const auto halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    if (count == 2 * kLanes) {
      _mm512_storeu_si512(p, halves);
    } else {
      _mm512_mask_storeu_epi16(p, (1u << count) - 1, halves);
    }
    return;
  }
#endif
  if (count == 2 * kLanes) {
    S::store(p, S::to_bfloat16(first));
    S::store(p + kLanes, S::to_bfloat16(second));
  } else if (count <= kLanes) {
    store_part<kLanes>(p, S::to_bfloat16(first), count);
  } else {
    S::store(p, S::to_bfloat16(first));
    store_part<kLanes>(p + kLanes, S::to_bfloat16(second), count - kLanes);
  }
}

// A ReLU with a largest result. NaN stays.
template <int kLanes, class Vec>
inline __attribute__((always_inline)) Vec clamped(Vec y, Vec most) {
  y = y < Vec{} ? Vec{} : y;
  return y > most ? most : y;
}

// The last step of a tile whose sums have left the registers: of rows that are cut short, of bfloat16 results, and of
// the smaller tiles, where it is one function for all sizes.
template <int kLanes, int kWidth>
__attribute__((noinline)) void finish_rows(const TileArgs& t, const Place& at, const float* sums, int rows,
                                           bool conv_nchw) {
  using S = Simd<kLanes, false>;
  using Vec = typename S::Vec;
  const Vec most = S::broadcast(t.out_max);
  for (int r = 0; r < rows; ++r, sums += kWidth) {
    for (int lane = 0; lane < t.valid; lane += kLanes) {
      const int count = t.valid - lane;
      const int64_t place = static_cast<int64_t>(lane) * (t.bfloat16 ? 2 : 4);
      Vec y = S::load(sums + lane);
      if (at.scale) y *= conv_nchw ? S::broadcast(at.scale[r]) : S::load(at.scale + lane);
      if (at.shift) y += conv_nchw ? S::broadcast(at.shift[r]) : S::load(at.shift + lane);
      if (at.residual) {
        const char* residual = at.residual + r * t.residual_row_stride + place;
        if (t.bfloat16) {
          const auto* p = reinterpret_cast<const uint16_t*>(residual);
          y += S::from_bfloat16(count < kLanes ? load_part<kLanes>(p, count) : S::load(p));
        } else {
          const auto* p = reinterpret_cast<const float*>(residual);
          y += count < kLanes ? load_part<kLanes>(p, count) : S::load(p);
        }
      }
      if (t.relu) y = clamped<kLanes>(y, most);
      char* out = at.out + r * t.out_row_stride + place;
      if (t.bfloat16) {
        const auto halves = S::to_bfloat16(y);
        auto* p = reinterpret_cast<uint16_t*>(out);
        count < kLanes ? store_part<kLanes>(p, halves, count) : S::store(p, halves);
      } else {
        auto* p = reinterpret_cast<float*>(out);
        count < kLanes ? store_part<kLanes>(p, y, count) : S::store(p, y);
      }
    }
  }
}

// Scale, shift, residual and ReLU of the sums of one tile. One pass over the registers for each: decided anew for every
// register, each would cost as many branches.
template <int kLanes, int kRows, int kVectors, bool kConvNchw, class Vec>
inline __attribute__((always_inline)) void fuse(const TileArgs& t, const Place& at, Vec (&acc)[kRows][kVectors]) {
  using S = Simd<kLanes, false>;
  const auto all = [&](const auto& use) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) use(acc[r][v], r, v);
    }
  };
  if (at.scale) {
    all([&](Vec& y, int r, int v) __attribute__((always_inline)) {
      y *= kConvNchw ? S::broadcast(at.scale[r]) : S::load(at.scale + v * kLanes);
    });
  }
  if (at.shift) {
    all([&](Vec& y, int r, int v) __attribute__((always_inline)) {
      y += kConvNchw ? S::broadcast(at.shift[r]) : S::load(at.shift + v * kLanes);
    });
  }
  if (at.residual && !t.bfloat16) {
    all([&](Vec& y, int r, int v) __attribute__((always_inline)) {
      const auto* p = reinterpret_cast<const float*>(at.residual + r * t.residual_row_stride) + v * kLanes;
      const int count = t.valid - v * kLanes;
      y += count >= kLanes ? S::load(p) : load_part<kLanes>(p, count < 0 ? 0 : count);
    });
  } else if (at.residual) {
    all([&](Vec& y, int r, int v) __attribute__((always_inline)) {
      const auto* p = reinterpret_cast<const uint16_t*>(at.residual + r * t.residual_row_stride) + v * kLanes;
      const int count = t.valid - v * kLanes;
      y += S::from_bfloat16(count >= kLanes ? S::load(p) : load_part<kLanes>(p, count < 0 ? 0 : count));
    });
  }
  if (t.relu) {
    const Vec most = S::broadcast(t.out_max);
    all([&](Vec& y, int, int) __attribute__((always_inline)) { y = clamped<kLanes>(y, most); });
  }
}

template <int kLanes, int kRows, int kVectors, class Vec>
inline __attribute__((always_inline)) void store_floats(const TileArgs& t, const Place& at,
                                                        const Vec (&acc)[kRows][kVectors]) {
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      Simd<kLanes, false>::store(reinterpret_cast<float*>(at.out + r * t.out_row_stride) + v * kLanes, acc[r][v]);
    }
  }
}

// Rows of bfloat16, or cut short.
template <int kLanes, bool kPairs, int kRows, int kVectors, class Vec>
inline __attribute__((always_inline)) void store_parts(const TileArgs& t, const Place& at,
                                                       const Vec (&acc)[kRows][kVectors]) {
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    char* out = at.out + r * t.out_row_stride;
    if (kPairs && t.bfloat16) {
      store_bfloat16<kLanes>(reinterpret_cast<uint16_t*>(out), acc[r][0], acc[r][kVectors - 1], t.valid);
      continue;
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const int count = t.valid - v * kLanes;
      if (count > 0) store_part<kLanes>(reinterpret_cast<float*>(out) + v * kLanes, acc[r][v], count);
    }
  }
}

template <int kLanes, bool kPairs, int kTileRows, int kRows, int kVectors, bool kConvNchw>
inline __attribute__((always_inline)) void one_tile(const TileArgs& t, Place& at) {
  using S = Simd<kLanes, kPairs>;
  using Vec = typename S::Vec;
  constexpr int kWidth = kVectors * kLanes;
  Vec acc[kRows][kVectors];
  if (!t.store_partial && !t.out_near) {
    // The lines of the result and the residual are fetched while the sums are built, so that the end does not wait for
    // them.
    // Of a bfloat16 row that is not aligned to lines, the second is the next panel's first.
    constexpr int kLine = kPairs ? 32 : 16;
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int line = 0; line < kWidth; line += kLine) {
        __builtin_prefetch(at.out + r * t.out_row_stride + line * (64 / kLine), 1);
      }
    }
    if (at.residual) {
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int line = 0; line < kWidth; line += kLine) {
          __builtin_prefetch(at.residual + r * t.residual_row_stride + line * (64 / kLine));
        }
      }
    }
  }
  if (t.load_partial) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[r][v] = S::load(at.partial + r * kWidth + v * kLanes);
    }
  } else {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[r][v] = Vec{};
    }
  }

  const float* w = at.weight;
  if constexpr (kConvNchw) {
    const float* x = t.panel;
    for (int64_t k = t.depth; k > 0; --k) {
      Vec b[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) b[v] = S::load(x + v * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const Vec a = S::broadcast(w[r]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) S::add_product(acc[r][v], a, b[v]);
      }
      x += t.panel_stride;
      w += kRows;
    }
  } else {
    const int64_t ahead = t.ahead ? at.ahead - reinterpret_cast<const char*>(w) : 0;
    for (int s = 0; s < t.segment_count; ++s) {
      const Segment& segment = t.segments[s];
      const float* row[kRows];
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) row[r] = at.source[static_cast<int64_t>(segment.tap) * t.row_stride + r];
      const int32_t* offset = t.offsets + segment.begin;
      const int32_t* const end = offset + segment.count;
      for (; offset != end; ++offset) {
        const int64_t place = *offset;
        __builtin_prefetch(reinterpret_cast<const char*>(w) + ahead);
        Vec b[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) b[v] = S::load(w + v * kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
          const Vec a = S::broadcast(row[r][place]);
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) S::add_product(acc[r][v], a, b[v]);
        }
        w += kWidth;
      }
    }
    if (t.ahead) at.ahead = reinterpret_cast<const char*>(w) + ahead;
  }

  if (t.store_partial) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) S::store(at.partial + r * kWidth + v * kLanes, acc[r][v]);
    }
    return;
  }
  const bool whole = t.valid == kWidth && !t.bfloat16;
  const bool plain = !at.scale && !at.shift && !at.residual && !t.relu;
  if (whole && plain) {
    store_floats<kLanes>(t, at, acc);
    return;
  }
  // Only the largest tiles finish in registers: unrolled for every size this would be most of the code.
  if constexpr (kRows == kTileRows && (kVectors == kMaxVectors || kMasks<kLanes>)) {
    if (t.bfloat16 ? kPairs : whole || kMasks<kLanes>) {
      if (!plain) fuse<kLanes, kRows, kVectors, kConvNchw>(t, at, acc);
      if (whole) {
        store_floats<kLanes>(t, at, acc);
      } else {
        store_parts<kLanes, kPairs>(t, at, acc);
      }
      return;
    }
  }
  alignas(64) float sums[kRows][kWidth];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) S::store(&sums[r][v * kLanes], acc[r][v]);
  }
  finish_rows<kLanes, kWidth>(t, at, &sums[0][0], kRows, kConvNchw);
}

template <int kLanes, bool kPairs, int kTileRows, int kRows, int kVectors, bool kConvNchw>
void tile_kernel(const TileArgs& t) {
  Place at{t.weight, t.source, t.partial, t.scale, t.shift, t.out, t.residual, t.ahead};
  for (int i = t.tiles; i > 0; --i) {
    one_tile<kLanes, kPairs, kTileRows, kRows, kVectors, kConvNchw>(t, at);
    at.weight += t.weight_step;
    at.source += t.source_step;
    at.partial += t.partial_step;
    if (at.scale) at.scale += t.channel_step;
    if (at.shift) at.shift += t.channel_step;
    at.out += t.out_step;
    if (at.residual) at.residual += t.residual_step;
  }
}

template <int kLanes, bool kPairs, int kTileRows, int kRows>
constexpr void fill_rows(KernelTable& table) {
  table.conv_nhwc[kRows - 1][0] = tile_kernel<kLanes, kPairs, kTileRows, kRows, 1, false>;
  table.conv_nhwc[kRows - 1][1] = tile_kernel<kLanes, kPairs, kTileRows, kRows, 2, false>;
  table.conv_nchw[kRows - 1][0] = tile_kernel<kLanes, kPairs, kTileRows, kRows, 1, true>;
  table.conv_nchw[kRows - 1][1] = tile_kernel<kLanes, kPairs, kTileRows, kRows, 2, true>;
  if constexpr (kRows < kTileRows) fill_rows<kLanes, kPairs, kTileRows, kRows + 1>(table);
}

template <int kLanes, bool kPairs, int kTileRows>
constexpr KernelTable make_table() {
  KernelTable table{};
  table.rows = kTileRows;
  table.lanes = kLanes;
  fill_rows<kLanes, kPairs, kTileRows, 1>(table);
  return table;
}
