// Runs the tiles of csrc/backends/cpu/microkernels against plain loops in double precision: every size, every number of
// valid lanes, everything else at random. No torch, so that it runs in an emulator of another CPU too.
//   tile_test [--rounds N] [table...]
// Without names: each table that was compiled in and whose instructions the CPU has. Exit status: 0 if all agree, 1 if
// not, 2 if a table that was named cannot run. Operands end, or begin, at a page that may not be touched; whatever else
// lies beside them is NaN and must stay as it is.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "backends/cpu/cpu_features.h"
#include "backends/cpu/microkernels/tile.h"
#include "guarded.h"

namespace {

using bap_kernels::micro::KernelTable;
using bap_kernels::micro::Segment;
using bap_kernels::micro::TileArgs;

enum class Values { kIntegers, kReals, kSpecial };  // sums are exact; are rounded; are given, and no step is done

struct Case {
  bool pairs, conv_nchw;
  int rows, width, valid, tiles, row_stride;
  Values values;
  bool along_lanes;  // tiles lie side by side in a row, not below each other
  bool load, store, scale, shift, residual, relu, limit, bfloat16, at_end;
  std::vector<Segment> segments;
  std::vector<int32_t> offsets;
  int depth, channels, taps;

  int element() const { return bfloat16 ? 2 : 4; }
  int out_row() const { return (along_lanes ? tiles : 1) * width + 3; }  // elements, with a gap
};

// bfloat16 of v by way of its definition: nearest multiple of the last place, ties to even.
double rounded_bfloat16(double v) {
  if (!std::isfinite(v) || v == 0) return v;
  int exponent;
  std::frexp(v, &exponent);
  const double unit = std::ldexp(1.0, std::max(exponent, -125) - 8);
  const double nearest = std::nearbyint(v / unit) * unit;
  return std::fabs(nearest) >= std::ldexp(1.0, 128) ? std::copysign(INFINITY, v) : nearest;
}

double value_of(const char* p, bool bfloat16) {
  uint32_t bits = 0;
  std::memcpy(bfloat16 ? reinterpret_cast<char*>(&bits) + 2 : reinterpret_cast<char*>(&bits), p, bfloat16 ? 2 : 4);
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

class Operands {
 public:
  explicit Operands(Random& random) : random_(random) {}

  // One case; false and a line on standard output if a result is wrong.
  bool run(const KernelTable& table, const Case& c) {
    c_ = c;
    prepare();
    const std::vector<char> out_before = out_.copy(), partial_before = partial_.copy();
    const auto* kernels = c.conv_nchw ? table.conv_nchw : table.conv_nhwc;
    kernels[c.rows - 1][c.width / table.lanes - 1](args_);
    return check(out_before, partial_before);
  }

 private:
  // ---- operands

  float number() {
    if (c_.values == Values::kReals) return random_.real();
    return static_cast<float>(random_.below(9)) - 4.f;  // bfloat16 holds these too
  }

  // 32 bits as a lane holds them: a float, or two bfloat16.
  void put_lane(char* p) {
    if (!c_.pairs) {
      const float f = number();
      std::memcpy(p, &f, 4);
    } else {
      put_number(p, true);
      put_number(p + 2, true);
    }
  }

  void put_number(char* p, bool bfloat16) {
    const auto f = static_cast<float>(bfloat16 ? rounded_bfloat16(number()) : number());
    const char* bytes = reinterpret_cast<const char*>(&f);
    std::memcpy(p, bfloat16 ? bytes + 2 : bytes, bfloat16 ? 2 : 4);
  }

  float* lanes(Guarded& memory, int64_t count) {
    char* p = memory.place(count * 4, c_.at_end);
    for (int64_t i = 0; i < count; ++i) put_lane(p + i * 4);
    return reinterpret_cast<float*>(p);
  }

  float* floats(Guarded& memory, int64_t count) {
    char* p = memory.place(count * 4, c_.at_end);
    for (int64_t i = 0; i < count; ++i) put_number(p + i * 4, false);
    return reinterpret_cast<float*>(p);
  }

  void prepare() {
    TileArgs t{};
    const bool new_weight = c_.along_lanes != c_.conv_nchw;  // the next tile has other output channels
    const int per_tile = (c_.conv_nchw ? c_.rows : c_.width);
    t.tiles = c_.tiles;
    t.weight_step = new_weight ? per_tile * c_.depth : 0;
    t.weight = lanes(weight_, (c_.tiles - 1) * t.weight_step + per_tile * c_.depth);
    if (c_.conv_nchw) {
      t.panel_stride = c_.width + random_.below(9);
      t.panel = lanes(source_, c_.depth > 0 ? (c_.depth - 1) * t.panel_stride + c_.width : 0);
      t.depth = c_.depth;
    } else {
      prepare_pixels(t);
    }
    const int tile_sums = c_.rows * c_.width;
    t.partial_step = tile_sums + random_.below(3);
    t.partial = floats(partial_, (c_.tiles - 1) * t.partial_step + tile_sums);
    if (c_.values == Values::kSpecial) put_specials(t);
    t.load_partial = c_.load;
    t.store_partial = c_.store;
    t.channel_step = new_weight ? per_tile : 0;
    const int64_t channels = (c_.tiles - 1) * t.channel_step + per_tile;
    t.scale = c_.scale ? floats(scale_, channels) : nullptr;
    t.shift = c_.shift ? floats(shift_, channels) : nullptr;
    t.out_row_stride = c_.out_row() * c_.element();
    t.out_step = c_.along_lanes ? c_.width * c_.element() : c_.rows * t.out_row_stride;
    t.residual_row_stride = t.out_row_stride + c_.element();
    t.residual_step = c_.along_lanes ? t.out_step : c_.rows * t.residual_row_stride;
    const int64_t rows = c_.along_lanes ? c_.rows : c_.tiles * c_.rows;
    const int64_t last_row = ((c_.along_lanes ? c_.tiles - 1 : 0) * c_.width + c_.valid) * c_.element();
    t.out = out_.place((rows - 1) * t.out_row_stride + last_row, c_.at_end);
    if (c_.residual) {
      char* residual = residual_.place((rows - 1) * t.residual_row_stride + last_row, c_.at_end);
      for (int64_t tile = 0; tile < c_.tiles; ++tile) {
        for (int64_t i = 0; i < c_.rows * c_.valid; ++i) {
          put_number(
              residual + tile * t.residual_step + i / c_.valid * t.residual_row_stride + i % c_.valid * c_.element(),
              c_.bfloat16);
        }
      }
      t.residual = residual;
    }
    t.relu = c_.relu;
    t.out_max = c_.limit ? .5f : std::numeric_limits<float>::infinity();
    t.bfloat16 = c_.bfloat16;
    t.valid = c_.valid;
    args_ = t;
  }

  void prepare_pixels(TileArgs& t) {
    const int64_t span = c_.channels * 3, pixels = c_.tiles * c_.taps * c_.row_stride;
    const float* x = lanes(source_, span);
    pointers_.assign(pixels, nullptr);
    // The first and the last place are always among them.
    for (auto& p : pointers_) p = x + random_.below(static_cast<int>(span - c_.channels) + 1);
    pointers_.front() = x, pointers_.back() = x + span - c_.channels;
    t.source = pointers_.data();
    t.source_step = c_.along_lanes ? 0 : c_.taps * c_.row_stride;
    t.row_stride = c_.row_stride;
    t.offsets = c_.offsets.data();
    t.segments = c_.segments.data();
    t.segment_count = static_cast<int32_t>(c_.segments.size());
  }

  // Sums that rounding and comparisons treat in ways of their own.
  void put_specials(const TileArgs& t) {
    static const uint32_t kBits[] = {0x00000000, 0x80000000, 0x7f800000, 0xff800000, 0x7fc00001, 0xff800001,
                                     0x00000001, 0x80008000, 0x00018000, 0x7f7fffff, 0xff7f8000, 0x7f7f7fff,
                                     0x3f808000, 0x3f818000, 0xbf807fff, 0xbf808001, 0x007fffff, 0x33800000};
    for (int64_t i = 0; i < (c_.tiles - 1) * t.partial_step + c_.rows * c_.width; ++i) {
      const uint32_t bits = random_.below(4) ? kBits[random_.below(18)] : static_cast<uint32_t>(random_.next());
      std::memcpy(t.partial + i, &bits, 4);
    }
  }

  // ---- what must come out

  struct Sum {
    double value, size;  // size: the sum of magnitudes
  };

  void add(Sum& sum, const float* a, const float* b) const {
    const char *p = reinterpret_cast<const char*>(a), *q = reinterpret_cast<const char*>(b);
    for (int half = 0; half < (c_.pairs ? 2 : 1); ++half) {
      const double product = value_of(p + 2 * half, c_.pairs) * value_of(q + 2 * half, c_.pairs);
      sum.value += product;
      sum.size += std::fabs(product);
    }
  }

  Sum expected_sum(int64_t tile, int r, int lane, const std::vector<char>& partial_before) const {
    const TileArgs& t = args_;
    Sum sum{0, 0};
    if (t.load_partial) {
      const int64_t place = tile * t.partial_step + r * c_.width + lane;
      sum.value =
          value_of(partial_before.data() + (reinterpret_cast<const char*>(t.partial + place) - partial_.data()), false);
      sum.size = std::fabs(sum.value);
    }
    const float* w = t.weight + tile * t.weight_step;
    if (c_.conv_nchw) {
      for (int64_t k = 0; k < t.depth; ++k) add(sum, w + k * c_.rows + r, t.panel + k * t.panel_stride + lane);
      return sum;
    }
    for (const Segment& s : c_.segments) {
      const float* row = t.source[tile * t.source_step + s.tap * t.row_stride + r];
      for (int i = 0; i < s.count; ++i, w += c_.width) add(sum, row + c_.offsets[s.begin + i], w + lane);
    }
    return sum;
  }

  Sum finished(Sum sum, int64_t tile, int r, int lane) const {
    const TileArgs& t = args_;
    const int64_t channel = tile * t.channel_step + (c_.conv_nchw ? r : lane);
    if (t.scale) sum.value *= t.scale[channel], sum.size *= std::fabs(t.scale[channel]);
    if (t.shift) sum.value += t.shift[channel], sum.size += std::fabs(t.shift[channel]);
    if (t.residual) {
      const double more =
          value_of(t.residual + tile * t.residual_step + r * t.residual_row_stride + lane * c_.element(), c_.bfloat16);
      sum.value += more, sum.size += std::fabs(more);
    }
    if (t.relu && sum.value < 0) sum.value = 0;
    if (t.relu && sum.value > t.out_max) sum.value = t.out_max;
    return sum;
  }

  bool agrees(double got, Sum want, bool bfloat16) const {
    const double nearest = bfloat16 ? rounded_bfloat16(want.value) : want.value;
    if (std::isnan(nearest)) return std::isnan(got);
    // AVX512_BF16 takes denormal numbers for zero when it rounds, as when it multiplies.
    if (c_.pairs && bfloat16 && std::fabs(want.value) < 0x1p-126 && got == 0) return true;
    if (c_.values != Values::kReals) return got == nearest;
    return std::fabs(got - want.value) <=
           (c_.depth * (c_.pairs ? 2 : 1) + 8) * 6e-8 * want.size + (bfloat16 ? std::fabs(want.value) / 256 : 0);
  }

  bool check(std::vector<char> out, std::vector<char> partial) {
    const TileArgs& t = args_;
    const std::vector<char> out_after = out_.copy(), partial_after = partial_.copy(), before = partial;
    for (int64_t tile = 0; tile < c_.tiles; ++tile) {
      for (int r = 0; r < c_.rows; ++r) {
        for (int lane = 0; lane < (t.store_partial ? c_.width : c_.valid); ++lane) {
          Sum want = expected_sum(tile, r, lane, before);
          const char* at;
          std::vector<char>& expected = t.store_partial ? partial : out;
          const std::vector<char>& after = t.store_partial ? partial_after : out_after;
          const bool bfloat16 = !t.store_partial && c_.bfloat16;
          if (t.store_partial) {
            at = reinterpret_cast<const char*>(t.partial + tile * t.partial_step + r * c_.width + lane);
          } else {
            want = finished(want, tile, r, lane);
            at = t.out + tile * t.out_step + r * t.out_row_stride + lane * c_.element();
          }
          const double got = value_of(at, bfloat16);
          if (!agrees(got, want, bfloat16)) return fail("value", tile, r, lane, got, want.value);
          const int64_t place = at - (t.store_partial ? partial_ : out_).data();
          std::memcpy(&expected[place], &after[place], bfloat16 ? 2 : 4);
        }
      }
    }
    if (out != out_after) return fail("write beside the result", 0, 0, 0, 0, 0);
    if (partial != partial_after) return fail("write beside the sums", 0, 0, 0, 0, 0);
    return true;
  }

  bool fail(const char* what, int64_t tile, int r, int lane, double got, double want) const {
    std::printf(
        "wrong %s: %s rows %d width %d valid %d tiles %d depth %d load %d store %d scale %d shift %d residual %d relu "
        "%d bfloat16 %d: tile %d row %d lane %d is %.9g, expected %.9g\n",
        what, c_.conv_nchw ? "conv_nchw" : "conv_nhwc", c_.rows, c_.width, c_.valid, c_.tiles, c_.depth, c_.load,
        c_.store, c_.scale, c_.shift, c_.residual, c_.relu, c_.bfloat16, static_cast<int>(tile), r, lane, got, want);
    return false;
  }

  Random& random_;
  Case c_;
  TileArgs args_;
  Guarded weight_{32768}, source_{8192}, partial_{8192}, scale_{4096}, shift_{4096}, out_{8192}, residual_{8192};
  std::vector<const float*> pointers_;
};

Case random_case(Random& random, const KernelTable& table, bool pairs, bool conv_nchw, int rows, int vectors,
                 int valid) {
  Case c{};
  c.pairs = pairs, c.conv_nchw = conv_nchw, c.rows = rows, c.width = vectors * table.lanes, c.valid = valid;
  c.tiles = 1 + random.below(3);
  c.values = static_cast<Values>(random.below(3));
  const bool special = c.values == Values::kSpecial;
  c.along_lanes = random.below(2);
  c.load = special || random.below(3) == 0;
  c.store = random.below(5) == 0;
  c.scale = !special && random.below(2), c.shift = !special && random.below(2);
  c.residual = !special && random.below(2);
  c.relu = random.below(2), c.limit = random.below(2), c.bfloat16 = random.below(2), c.at_end = random.below(2);
  c.channels = 1 + random.below(24);
  c.taps = 1 + random.below(3);
  c.row_stride = rows + random.below(2);
  if (special) return c;
  if (conv_nchw) {
    c.depth = random.below(24);
    return c;
  }
  for (int i = random.below(24); i > 0; --i) c.offsets.push_back(random.below(c.channels));
  if (!c.offsets.empty()) c.offsets.back() = c.channels - 1;
  const int units = static_cast<int>(c.offsets.size());
  for (int i = 0; i < c.taps; ++i) {
    const int begin = random.below(units + 1);
    c.segments.push_back({random.below(c.taps), begin, random.below(units - begin + 1)});
    c.depth += c.segments.back().count;
  }
  return c;
}

struct Named {
  const char *name, *isa;
  const KernelTable* table;
  bool pairs;
};

// Calls that were right; the first wrong one ends it with -1.
int64_t run_table(const Named& named, int rounds) {
  Random random(1);
  Operands operands(random);
  int64_t calls = 0;
  for (int round = 0; round < rounds; ++round) {
    for (int rows = 1; rows <= named.table->rows; ++rows) {
      for (int vectors = 1; vectors <= bap_kernels::micro::kMaxVectors; ++vectors) {
        for (int valid = 1; valid <= vectors * named.table->lanes; ++valid) {
          for (const bool conv_nchw : {false, true}) {
            const Case c = random_case(random, *named.table, named.pairs, conv_nchw, rows, vectors, valid);
            if (!operands.run(*named.table, c)) return -1;
            // Whole tiles without gaps have paths of their own.
            Case whole =
                random_case(random, *named.table, named.pairs, conv_nchw, rows, vectors, vectors * named.table->lanes);
            whole.bfloat16 = false;
            if (!operands.run(*named.table, whole)) return -1;
            calls += 2;
          }
        }
      }
    }
  }
  return calls;
}

std::vector<Named> tables() {
  std::vector<Named> found;
#if defined(BAP_KERNELS_HAVE_NEON)
  found.push_back({"neon", "neon", bap_kernels::micro::table_neon(), false});
#endif
#if defined(BAP_KERNELS_HAVE_AVX2)
  found.push_back({"avx2", "avx2", bap_kernels::micro::table_avx2(), false});
#endif
#if defined(BAP_KERNELS_HAVE_EMULATED)
  found.push_back({"neon_emulated", "avx2", bap_kernels::micro::table_neon_emulated(), false});
  found.push_back({"avx512_emulated", "avx2", bap_kernels::micro::table_avx512_emulated(), false});
  found.push_back({"avx512_emulated_pairs", "avx2", bap_kernels::micro::table_avx512_emulated_pairs(), true});
#endif
#if defined(BAP_KERNELS_HAVE_AVX512)
  found.push_back({"avx512", "avx512", bap_kernels::micro::table_avx512(), false});
#endif
#if defined(BAP_KERNELS_HAVE_AVX512BF16)
  found.push_back({"avx512_pairs", "avx512bf16", bap_kernels::micro::table_avx512_pairs(), true});
#endif
  return found;
}

}  // namespace

int main(int argc, char** argv) {
  int rounds = 2, status = 0;
  std::vector<std::string> wanted(argv + 1, argv + argc);
  if (wanted.size() > 1 && wanted[0] == "--rounds") {
    rounds = std::atoi(argv[2]);
    wanted.erase(wanted.begin(), wanted.begin() + 2);
  }
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  for (const char* isa : {"neon", "avx2", "avx512", "avx512bf16"})
    std::printf("cpu %s: %d\n", isa, bap_kernels::cpu_has(isa));
  const std::vector<Named> all = tables();
  for (const std::string& name : wanted) {
    const auto is_it = [&](const Named& named) { return name == named.name; };
    if (std::any_of(all.begin(), all.end(), is_it)) continue;
    std::printf("%s: not compiled in\n", name.c_str());
    status = 2;
  }
  for (const Named& named : all) {
    const bool asked = std::find(wanted.begin(), wanted.end(), named.name) != wanted.end();
    if (!wanted.empty() && !asked) continue;
    if (!bap_kernels::cpu_has(named.isa)) {
      std::printf("%s: skipped, the CPU lacks it\n", named.name);
      if (asked) status = 2;
      continue;
    }
    const int64_t calls = run_table(named, rounds);
    std::printf("%s: %lld calls: %s\n", named.name, static_cast<long long>(calls), calls < 0 ? "WRONG" : "ok");
    if (calls < 0) status = 1;
  }
  return status;
}
