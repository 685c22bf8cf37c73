// The register tile of the gathered convolution, written once for every vector width.
//   acc[r][lane] = sum over k of broadcast(r, k) * vector(k, lane);  y = min(relu(acc * scale + shift + residual),
//   out_max)
// conv_nhwc broadcasts activations, found through a pixel pointer plus a channel offset: the gather is one extra
// load per step. conv_nchw broadcasts packed weights and reads activations as whole vectors.
// Included by one source file per instruction set behind simd.h, inside that file's own anonymous namespace.
// Accumulates in fp32. The order of the sum depends on the reduction alone, never on the tile's place or the threads.

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

// The last step of a tile whose sums have left the registers: of rows that are cut short, of bfloat16 results, and of
// the smaller tiles, where it is one function for all sizes.
template <int kLanes, int kWidth>
__attribute__((noinline)) void finish_rows(const TileArgs& t, const Place& at, const float* sums, int rows,
                                           bool conv_nchw) {
  using S = Simd<kLanes, false>;
  using Vec = typename S::Vec;
  const Vec least = S::broadcast(t.out_min), most = S::broadcast(t.out_max);
  for (int r = 0; r < rows; ++r, sums += kWidth) {
    for (int lane = 0; lane < t.valid; lane += kLanes) {
      const int count = t.valid - lane;
      const int64_t place = static_cast<int64_t>(lane) * (t.bfloat16 ? 2 : 4);
      Vec y = S::load(sums + lane);
      const auto of_lane = [&](const float* p) { return conv_nchw ? S::broadcast(p[r]) : S::load(p + lane); };
      if (at.scale && at.shift) {
        y = y * of_lane(at.scale) + of_lane(at.shift);
      } else if (at.scale) {
        y *= of_lane(at.scale);
      } else if (at.shift) {
        y += of_lane(at.shift);
      }
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
      if (t.relu) y = clamped(y, least, most);
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
  const auto scale = [&](int r, int v) __attribute__((always_inline)) {
    return kConvNchw ? S::broadcast(at.scale[r]) : S::load(at.scale + v * kLanes);
  };
  const auto shift = [&](int r, int v) __attribute__((always_inline)) {
    return kConvNchw ? S::broadcast(at.shift[r]) : S::load(at.shift + v * kLanes);
  };
  if (at.scale && at.shift) {
    all([&](Vec& y, int r, int v) __attribute__((always_inline)) { y = y * scale(r, v) + shift(r, v); });
  } else if (at.scale) {
    all([&](Vec& y, int r, int v) __attribute__((always_inline)) { y *= scale(r, v); });
  } else if (at.shift) {
    all([&](Vec& y, int r, int v) __attribute__((always_inline)) { y += shift(r, v); });
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
    const Vec least = S::broadcast(t.out_min), most = S::broadcast(t.out_max);
    all([&](Vec& y, int, int) __attribute__((always_inline)) { y = clamped(y, least, most); });
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
