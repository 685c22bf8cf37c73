// The table of instructions: each spelling, and what it does to registers and memory. Those of tensor cores are in
// tensor.cpp.
#include <cmath>
#include <functional>
#include <set>

#include "lanes.h"
#include "tensor.h"

namespace ptx {
namespace {

using Builder = std::function<void(const std::vector<Operand>&, Instruction&)>;
std::map<std::string, Builder>& table() {
  static std::map<std::string, Builder> entries;
  return entries;
}

int register_of(const Operand& operand) {
  if (operand.form != Operand::kRegister) throw Fault("expected a register or a number");
  return operand.reg;
}

// Results first, then sources: all registers.
Builder plain(Function run, size_t sources, Kind kind = Kind::kPlain) {
  return [=](const std::vector<Operand>& operands, Instruction& to) {
    if (operands.size() != sources + 1) throw Fault("expected " + std::to_string(sources + 1) + " operands");
    to.run = run;
    to.kind = kind;
    to.to = {register_of(operands[0])};
    for (size_t i = 1; i <= sources; ++i) to.from.push_back(register_of(operands[i]));
  };
}

template <typename To, typename From, auto kFunction>
void unary(Warp& w, const Instruction& i, uint32_t mask) {
  uint64_t* to = w.reg(i.to[0]);
  const uint64_t* a = w.reg(i.from[0]);
  each_lane(mask, [&](int lane) { to[lane] = Raw<To>::write(kFunction(Raw<From>::read(a[lane]))); });
}
template <typename To, typename A, typename B, auto kFunction>
void binary(Warp& w, const Instruction& i, uint32_t mask) {
  uint64_t* to = w.reg(i.to[0]);
  const uint64_t *a = w.reg(i.from[0]), *b = w.reg(i.from[1]);
  each_lane(mask,
            [&](int lane) { to[lane] = Raw<To>::write(kFunction(Raw<A>::read(a[lane]), Raw<B>::read(b[lane]))); });
}
template <typename To, typename A, typename B, typename C, auto kFunction>
void ternary(Warp& w, const Instruction& i, uint32_t mask) {
  uint64_t* to = w.reg(i.to[0]);
  const uint64_t *a = w.reg(i.from[0]), *b = w.reg(i.from[1]), *c = w.reg(i.from[2]);
  each_lane(mask, [&](int lane) {
    to[lane] = Raw<To>::write(kFunction(Raw<A>::read(a[lane]), Raw<B>::read(b[lane]), Raw<C>::read(c[lane])));
  });
}

template <typename T>
using Unsigned = std::make_unsigned_t<T>;
template <typename T>
struct Twice;
template <>
struct Twice<int16_t> {
  using type = int32_t;
};
template <>
struct Twice<uint16_t> {
  using type = uint32_t;
};
template <>
struct Twice<int32_t> {
  using type = int64_t;
};
template <>
struct Twice<uint32_t> {
  using type = uint64_t;
};
template <>
struct Twice<int64_t> {
  using type = __int128;
};
template <>
struct Twice<uint64_t> {
  using type = unsigned __int128;
};

// Arithmetic wraps.
template <typename T>
constexpr auto kMulLo =
    [](T a, T b) -> T { return static_cast<T>(static_cast<uint64_t>(a) * static_cast<uint64_t>(b)); };
template <typename T>
constexpr auto kAdd = [](T a, T b) -> T { return static_cast<T>(static_cast<uint64_t>(a) + static_cast<uint64_t>(b)); };
template <typename T>
constexpr auto kSub = [](T a, T b) -> T { return static_cast<T>(static_cast<uint64_t>(a) - static_cast<uint64_t>(b)); };
// Division by zero is no error: the result is all ones, the rest is what was divided.
template <typename T>
constexpr auto kDiv = [](T a, T b) -> T {
  if (b == 0) return static_cast<T>(~uint64_t{0});
  if constexpr (std::is_signed_v<T>) {
    if (b == T(-1)) return static_cast<T>(0 - static_cast<uint64_t>(a));
  }
  return static_cast<T>(a / b);
};
template <typename T>
constexpr auto kRem = [](T a, T b) -> T {
  if (b == 0) return a;
  if constexpr (std::is_signed_v<T>) {
    if (b == T(-1)) return 0;
  }
  return static_cast<T>(a % b);
};
template <typename T>
constexpr auto kShl = [](T a, uint32_t n) -> T { return n >= 8 * sizeof(T) ? T(0) : static_cast<T>(a << n); };
template <typename T>
constexpr auto kShr = [](T a, uint32_t n) -> T {
  if (n >= 8 * sizeof(T)) return std::is_signed_v<T> && a < 0 ? T(-1) : T(0);
  return static_cast<T>(a >> n);
};

template <typename T>
void add_integers(const std::string& t) {
  using W = typename Twice<T>::type;
  auto& to = table();
  to["add." + t] = plain(binary<T, T, T, kAdd<T>>, 2);
  to["sub." + t] = plain(binary<T, T, T, kSub<T>>, 2);
  to["mul.lo." + t] = plain(binary<T, T, T, kMulLo<T>>, 2);
  to["mul.hi." + t] = plain(
      binary<T, T, T, [](T a, T b) { return static_cast<T>(static_cast<W>(a) * static_cast<W>(b) >> 8 * sizeof(T)); }>,
      2);
  to["mad.lo." + t] = plain(ternary<T, T, T, T, [](T a, T b, T c) { return kAdd<T>(kMulLo<T>(a, b), c); }>, 3);
  if constexpr (sizeof(T) < 8) {
    to["mul.wide." + t] = plain(binary<W, T, T, [](T a, T b) { return static_cast<W>(static_cast<W>(a) * b); }>, 2);
    to["mad.wide." + t] =
        plain(ternary<W, T, T, W, [](T a, T b, W c) { return kAdd<W>(static_cast<W>(static_cast<W>(a) * b), c); }>, 3);
  }
  to["div." + t] = plain(binary<T, T, T, kDiv<T>>, 2);
  to["rem." + t] = plain(binary<T, T, T, kRem<T>>, 2);
  to["min." + t] = plain(binary<T, T, T, [](T a, T b) { return a < b ? a : b; }>, 2);
  to["max." + t] = plain(binary<T, T, T, [](T a, T b) { return a < b ? b : a; }>, 2);
  to["neg." + t] = plain(unary<T, T, [](T a) { return kSub<T>(0, a); }>, 1);
  to["abs." + t] = plain(unary<T, T, [](T a) { return a < T(0) ? kSub<T>(0, a) : a; }>, 1);
  to["shr." + t] = plain(binary<T, T, uint32_t, kShr<T>>, 2);
}

template <typename T>
void add_bits(const std::string& t) {
  auto& to = table();
  to["and." + t] = plain(binary<T, T, T, [](auto a, auto b) { return static_cast<decltype(a)>(a & b); }>, 2);
  to["or." + t] = plain(binary<T, T, T, [](auto a, auto b) { return static_cast<decltype(a)>(a | b); }>, 2);
  to["xor." + t] = plain(binary<T, T, T, [](auto a, auto b) { return static_cast<decltype(a)>(a ^ b); }>, 2);
  if constexpr (std::is_same_v<T, Bit>) {
    to["not." + t] = plain(unary<T, T, [](bool a) { return !a; }>, 1);
  } else {
    to["not." + t] = plain(unary<T, T, [](T a) { return static_cast<T>(~a); }>, 1);
    to["shl." + t] = plain(binary<T, T, uint32_t, kShl<T>>, 2);
    to["shr." + t] = plain(binary<T, T, uint32_t, kShr<T>>, 2);
  }
}

enum class Compare { kEq, kNe, kLt, kLe, kGt, kGe };
template <Compare kHow, bool kUnordered, typename T>
bool compare(T a, T b) {
  if constexpr (std::is_same_v<T, float>) {
    if (std::isnan(a) || std::isnan(b)) return kUnordered;
  }
  switch (kHow) {
    case Compare::kEq:
      return a == b;
    case Compare::kNe:
      return a != b;
    case Compare::kLt:
      return a < b;
    case Compare::kLe:
      return a <= b;
    case Compare::kGt:
      return a > b;
    default:
      return a >= b;
  }
}
template <Compare kHow, bool kUnordered, typename T>
void add_comparison(const std::string& how, const std::string& t) {
  auto& to = table();
  constexpr auto function = compare<kHow, kUnordered, T>;
  to["setp." + how + "." + t] = plain(binary<Bit, T, T, function>, 2);
  to["setp." + how + ".and." + t] =
      plain(ternary<Bit, T, T, Bit, [](T a, T b, bool c) { return compare<kHow, kUnordered, T>(a, b) && c; }>, 3);
  to["setp." + how + ".or." + t] =
      plain(ternary<Bit, T, T, Bit, [](T a, T b, bool c) { return compare<kHow, kUnordered, T>(a, b) || c; }>, 3);
}
template <typename T>
void add_comparisons(const std::string& t) {
  constexpr bool kFloat = std::is_same_v<T, float>;
  add_comparison<Compare::kEq, false, T>("eq", t);
  add_comparison<Compare::kNe, false, T>("ne", t);
  add_comparison<Compare::kLt, false, T>(std::is_unsigned_v<T> ? "lo" : "lt", t);
  add_comparison<Compare::kLe, false, T>(std::is_unsigned_v<T> ? "ls" : "le", t);
  add_comparison<Compare::kGt, false, T>(std::is_unsigned_v<T> ? "hi" : "gt", t);
  add_comparison<Compare::kGe, false, T>(std::is_unsigned_v<T> ? "hs" : "ge", t);
  if (std::is_unsigned_v<T>) {
    add_comparison<Compare::kLt, false, T>("lt", t);
    add_comparison<Compare::kLe, false, T>("le", t);
    add_comparison<Compare::kGt, false, T>("gt", t);
    add_comparison<Compare::kGe, false, T>("ge", t);
  }
  if (kFloat) {
    add_comparison<Compare::kEq, true, T>("equ", t);
    add_comparison<Compare::kNe, true, T>("neu", t);
    add_comparison<Compare::kLt, true, T>("ltu", t);
    add_comparison<Compare::kLe, true, T>("leu", t);
    add_comparison<Compare::kGt, true, T>("gtu", t);
    add_comparison<Compare::kGe, true, T>("geu", t);
  }
}

void select(Warp& w, const Instruction& i, uint32_t mask) {
  uint64_t* to = w.reg(i.to[0]);
  const uint64_t *a = w.reg(i.from[0]), *b = w.reg(i.from[1]), *p = w.reg(i.from[2]);
  each_lane(mask, [&](int lane) { to[lane] = p[lane] & 1 ? a[lane] : b[lane]; });
}

// mov, with vectors of two halves on one side or on none.
template <typename T>
void move(Warp& w, const Instruction& i, uint32_t mask) {
  uint64_t* to = w.reg(i.to[0]);
  const uint64_t* from = w.reg(i.from[0]);
  each_lane(mask, [&](int lane) { to[lane] = Raw<T>::write(Raw<T>::read(from[lane])); });
}
void join_halves(Warp& w, const Instruction& i, uint32_t mask) {
  uint64_t* to = w.reg(i.to[0]);
  const uint64_t *low = w.reg(i.from[0]), *high = w.reg(i.from[1]);
  const int bits = i.bytes * 4;
  each_lane(mask, [&](int lane) {
    const uint64_t keep = (uint64_t{1} << bits) - 1;
    to[lane] = (low[lane] & keep) | (high[lane] & keep) << bits;
  });
}
void split_halves(Warp& w, const Instruction& i, uint32_t mask) {
  const uint64_t* from = w.reg(i.from[0]);
  const int bits = i.bytes * 4;
  for (int half = 0; half < 2; ++half) {
    if (i.to[half] < 0) continue;
    uint64_t* to = w.reg(i.to[half]);
    each_lane(mask, [&](int lane) { to[lane] = from[lane] >> half * bits & ((uint64_t{1} << bits) - 1); });
  }
}
template <typename T>
void add_move(const std::string& t) {
  table()["mov." + t] = [](const std::vector<Operand>& operands, Instruction& to) {
    if (operands.size() != 2) throw Fault("expected 2 operands");
    to.bytes = sizeof(T);
    if (operands[1].form == Operand::kVector) {
      to.run = join_halves;
      to.to = {register_of(operands[0])};
      to.from = operands[1].members;
    } else if (operands[0].form == Operand::kVector) {
      to.run = split_halves;
      to.to = operands[0].members;
      to.from = {register_of(operands[1])};
    } else {
      to.run = move<T>;
      to.kind = Kind::kMove;
      to.to = {register_of(operands[0])};
      to.from = {register_of(operands[1])};
    }
  };
}
void move_bit(Warp& w, const Instruction& i, uint32_t mask) {
  each_lane(mask, [&](int lane) { w.reg(i.to[0])[lane] = w.reg(i.from[0])[lane] & 1; });
}

template <typename To, typename From>
void add_conversion(const std::string& to, const std::string& from) {
  table()["cvt." + to + "." + from] = plain(unary<To, From, [](From a) { return static_cast<To>(a); }>, 1);
}
template <typename From>
void add_conversions_from(const std::string& from) {
  add_conversion<uint8_t, From>("u8", from);
  add_conversion<int8_t, From>("s8", from);
  add_conversion<uint16_t, From>("u16", from);
  add_conversion<int16_t, From>("s16", from);
  add_conversion<uint32_t, From>("u32", from);
  add_conversion<int32_t, From>("s32", from);
  add_conversion<uint64_t, From>("u64", from);
  add_conversion<int64_t, From>("s64", from);
  table()["cvt.rn.f32." + from] = plain(unary<float, From, [](From a) { return static_cast<float>(a); }>, 1);
}

uint32_t bits_of(float value) { return std::bit_cast<uint32_t>(value); }
uint32_t round_to_tf32(float value) {
  const uint32_t bits = bits_of(value);
  // To the nearest, ties away from zero.
  return std::isfinite(value) ? (bits + 0x1000u) & 0xffffe000u : bits;
}
float maximum_or_nan(float a, float b) {
  if (std::isnan(a) || std::isnan(b)) return std::bit_cast<float>(0x7fffffffu);
  return a == b ? (std::signbit(a) ? b : a) : std::fmax(a, b);
}

template <bool kSigned>
uint32_t extract(uint32_t a, uint32_t at, uint32_t length) {
  at &= 255, length &= 255;
  if (length == 0) return 0;
  const uint64_t extended =
      kSigned ? static_cast<uint64_t>(static_cast<int64_t>(static_cast<int32_t>(a))) : static_cast<uint64_t>(a);
  const uint64_t shifted = at >= 32 ? (kSigned && static_cast<int32_t>(a) < 0 ? ~uint64_t{0} : 0) : extended >> at;
  if (length >= 32) return static_cast<uint32_t>(shifted);
  uint64_t field = shifted & ((uint64_t{1} << length) - 1);
  if (kSigned) {
    const uint32_t top = std::min(at + length - 1, 31u);
    if (a >> top & 1) field |= ~uint64_t{0} << length;
  }
  return static_cast<uint32_t>(field);
}
void insert_field(Warp& w, const Instruction& i, uint32_t mask) {
  each_lane(mask, [&](int lane) {
    const auto a = static_cast<uint32_t>(w.reg(i.from[0])[lane]), b = static_cast<uint32_t>(w.reg(i.from[1])[lane]);
    const uint64_t at = w.reg(i.from[2])[lane] & 255, length = w.reg(i.from[3])[lane] & 255;
    const uint64_t field = (length >= 32 ? 0xffffffffu : (uint64_t{1} << length) - 1) << std::min<uint64_t>(at, 63);
    w.reg(i.to[0])[lane] = ((b & ~field) | (uint64_t{a} << std::min<uint64_t>(at, 63) & field)) & 0xffffffffu;
  });
}
uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t to = 0;
  for (int k = 0; k < 4; ++k) {
    const uint32_t pick = selector >> 4 * k & 15;
    auto byte = static_cast<uint32_t>(bytes >> 8 * (pick & 7) & 255);
    if (pick & 8) byte = byte & 128 ? 255 : 0;
    to |= byte << 8 * k;
  }
  return to;
}

void add_arithmetic() {
  auto& to = table();
  add_integers<int16_t>("s16");
  add_integers<uint16_t>("u16");
  add_integers<int32_t>("s32");
  add_integers<uint32_t>("u32");
  add_integers<int64_t>("s64");
  add_integers<uint64_t>("u64");
  add_bits<uint16_t>("b16");
  add_bits<uint32_t>("b32");
  add_bits<uint64_t>("b64");
  add_bits<Bit>("pred");
  add_comparisons<int16_t>("s16");
  add_comparisons<uint16_t>("u16");
  add_comparisons<uint16_t>("b16");
  add_comparisons<int32_t>("s32");
  add_comparisons<uint32_t>("u32");
  add_comparisons<uint32_t>("b32");
  add_comparisons<int64_t>("s64");
  add_comparisons<uint64_t>("u64");
  add_comparisons<uint64_t>("b64");
  add_comparisons<float>("f32");
  for (const char* t : {"b16", "b32", "b64", "u16", "s16", "u32", "s32", "u64", "s64", "f32"}) {
    to[std::string("selp.") + t] = plain(select, 3);
  }
  add_move<uint16_t>("b16");
  add_move<uint16_t>("u16");
  add_move<int16_t>("s16");
  add_move<uint32_t>("b32");
  add_move<uint32_t>("u32");
  add_move<int32_t>("s32");
  add_move<uint32_t>("f32");
  add_move<uint64_t>("b64");
  add_move<uint64_t>("u64");
  add_move<int64_t>("s64");
  to["mov.pred"] = plain(move_bit, 1, Kind::kMove);
  for (const std::string rounding : {"", "rn."}) {
    to["add." + rounding + "f32"] = plain(binary<float, float, float, [](float a, float b) { return a + b; }>, 2);
    to["sub." + rounding + "f32"] = plain(binary<float, float, float, [](float a, float b) { return a - b; }>, 2);
    to["mul." + rounding + "f32"] = plain(binary<float, float, float, [](float a, float b) { return a * b; }>, 2);
  }
  to["fma.rn.f32"] =
      plain(ternary<float, float, float, float, [](float a, float b, float c) { return std::fma(a, b, c); }>, 3);
  to["neg.f32"] = plain(unary<uint32_t, uint32_t, [](uint32_t a) { return a ^ 0x80000000u; }>, 1);
  to["abs.f32"] = plain(unary<uint32_t, uint32_t, [](uint32_t a) { return a & 0x7fffffffu; }>, 1);
  to["max.f32"] = plain(binary<float, float, float, [](float a, float b) { return std::fmax(a, b); }>, 2);
  to["min.f32"] = plain(binary<float, float, float, [](float a, float b) { return std::fmin(a, b); }>, 2);
  to["max.NaN.f32"] = plain(binary<float, float, float, maximum_or_nan>, 2);
  to["bfe.u32"] = plain(ternary<uint32_t, uint32_t, uint32_t, uint32_t, extract<false>>, 3);
  to["bfe.s32"] = plain(ternary<uint32_t, uint32_t, uint32_t, uint32_t, extract<true>>, 3);
  to["bfi.b32"] = plain(insert_field, 4);
  to["prmt.b32"] = plain(ternary<uint32_t, uint32_t, uint32_t, uint32_t, permute>, 3);
  add_conversions_from<uint8_t>("u8");
  add_conversions_from<int8_t>("s8");
  add_conversions_from<uint16_t>("u16");
  add_conversions_from<int16_t>("s16");
  add_conversions_from<uint32_t>("u32");
  add_conversions_from<int32_t>("s32");
  add_conversions_from<uint64_t>("u64");
  add_conversions_from<int64_t>("s64");
  to["cvt.f32.f16"] = plain(unary<float, uint16_t, from_half>, 1);
  to["cvt.f32.bf16"] = plain(unary<float, uint16_t, from_bfloat16>, 1);
  to["cvt.rn.f16.f32"] = plain(unary<uint16_t, float, to_half>, 1);
  to["cvt.rn.bf16.f32"] = plain(unary<uint16_t, float, to_bfloat16>, 1);
  to["cvt.rna.tf32.f32"] = plain(unary<uint32_t, float, round_to_tf32>, 1);
  to["cvt.rn.f16x2.f32"] =
      plain(binary<uint32_t, float, float,
                   [](float a, float b) { return static_cast<uint32_t>(to_half(a)) << 16 | to_half(b); }>,
            2);
  to["cvt.rn.bf16x2.f32"] =
      plain(binary<uint32_t, float, float,
                   [](float a, float b) { return static_cast<uint32_t>(to_bfloat16(a)) << 16 | to_bfloat16(b); }>,
            2);
}

// Generic addresses: those of global memory are themselves, those of shared memory and of parameters lie far up.
constexpr uint64_t kSharedWindow = uint64_t{1} << 60, kParamWindow = uint64_t{2} << 60, kWindows = uint64_t{3} << 60;

template <uint64_t kWindow>
void into_window(Warp& w, const Instruction& i, uint32_t mask) {
  each_lane(mask, [&](int lane) { w.reg(i.to[0])[lane] = w.reg(i.from[0])[lane] | kWindow; });
}
void out_of_window(Warp& w, const Instruction& i, uint32_t mask) {
  each_lane(mask, [&](int lane) { w.reg(i.to[0])[lane] = w.reg(i.from[0])[lane] & ~kWindows; });
}

Space window_of(Space space, uint64_t& address) {
  if (space != Space::kNone) return space;
  const uint64_t window = address & kWindows;
  address &= ~kWindows;
  return window == kSharedWindow ? Space::kShared : window == kParamWindow ? Space::kParam : Space::kGlobal;
}

void load(Warp& w, const Instruction& i, uint32_t mask) {
  const int bytes = i.bytes, count = static_cast<int>(i.to.size());
  Block& block = w.block();
  const uint64_t* base = w.reg(i.from[0]);
  each_lane(mask, [&](int lane) {
    uint64_t address = base[lane] + i.offset;
    const uint8_t* from = nullptr;
    switch (window_of(i.space, address)) {
      case Space::kShared:
        from = block.shared.read(static_cast<uint32_t>(address), bytes * count, w.thread(lane));
        break;
      case Space::kParam:
        if (address + bytes * count > block.launch.parameters.size()) throw Fault("read behind the parameters");
        from = &block.launch.parameters[address];
        break;
      default:
        from = block.launch.global->read(address, bytes * count, w.accessor(lane));
    }
    for (int k = 0; k < count; ++k) {
      uint64_t value = 0;
      std::memcpy(&value, from + k * bytes, bytes);
      if (i.is_signed && bytes < 8) {
        const int unused = 64 - 8 * bytes;
        value = static_cast<uint64_t>(static_cast<int64_t>(value << unused) >> unused);
      }
      if (i.to[k] >= 0) w.reg(i.to[k])[lane] = value;
    }
  });
}

void store(Warp& w, const Instruction& i, uint32_t mask) {
  const int bytes = i.bytes, count = static_cast<int>(i.from.size()) - 1;
  Block& block = w.block();
  const uint64_t* base = w.reg(i.from[0]);
  // Lanes that write the same to one place at once do not race: compilers let them.
  const auto repeats = [&](int lane) {
    for (int other = 0; other < lane; ++other) {
      if ((mask >> other & 1) == 0 || base[other] != base[lane]) continue;
      bool same = true;
      for (int k = 0; k < count; ++k) {
        const uint64_t* values = w.reg(i.from[k + 1]);
        same = same && std::memcmp(&values[other], &values[lane], bytes) == 0;
      }
      if (same) return true;
    }
    return false;
  };
  each_lane(mask, [&](int lane) {
    uint64_t address = base[lane] + i.offset;
    uint8_t* to = nullptr;
    if (i.space == Space::kShared && repeats(lane)) return;
    switch (window_of(i.space, address)) {
      case Space::kShared:
        to = block.shared.write(static_cast<uint32_t>(address), bytes * count, w.thread(lane));
        break;
      case Space::kParam:
        throw Fault("write to parameters");
      default:
        to = block.launch.global->write(address, bytes * count, w.accessor(lane));
    }
    for (int k = 0; k < count; ++k) std::memcpy(to + k * bytes, &w.reg(i.from[k + 1])[lane], bytes);
  });
}

void add_memory() {
  const std::pair<const char*, Space> spaces[] = {{"", Space::kNone},
                                                  {".param", Space::kParam},
                                                  {".global", Space::kGlobal},
                                                  {".global.nc", Space::kGlobal},
                                                  {".shared", Space::kShared}};
  const std::string letters[] = {"b", "u", "s", "f"};
  for (const auto& [name, space] : spaces) {
    for (const std::string vector : {"", ".v2", ".v4"}) {
      for (const std::string& letter : letters) {
        for (const int bytes : {1, 2, 4, 8}) {
          if (letter == "f" && bytes < 4) continue;
          const int count = vector.empty() ? 1 : vector[2] - '0';
          if (bytes * count > 16) continue;
          const Space where = space;
          const bool is_signed = letter == "s";
          const std::string end = std::string(name) + vector + "." + letter + std::to_string(8 * bytes);
          const auto common = [=](const std::vector<Operand>& operands, size_t address, Instruction& to) {
            if (operands.size() != 2 || operands[address].form != Operand::kAddress) throw Fault("expected an address");
            const Operand& data = operands[1 - address];
            const std::vector<int> list =
                data.form == Operand::kVector ? data.members : std::vector<int>{register_of(data)};
            if (static_cast<int>(list.size()) != count) throw Fault("expected as many registers as the vector has");
            to.space = where;
            to.bytes = static_cast<uint8_t>(bytes);
            to.is_signed = is_signed;
            to.offset = operands[address].offset;
            to.from = {operands[address].reg};
            return list;
          };
          table()["ld" + end] = [=](const std::vector<Operand>& operands, Instruction& to) {
            to.to = common(operands, 1, to);
            to.run = load;
          };
          if (space == Space::kParam || std::string(name) == ".global.nc") continue;
          table()["st" + end] = [=](const std::vector<Operand>& operands, Instruction& to) {
            for (const int r : common(operands, 0, to)) to.from.push_back(r);
            to.run = store;
          };
        }
      }
    }
  }
  for (const std::string bits : {"u32", "u64"}) {
    table()["cvta.shared." + bits] = plain(into_window<kSharedWindow>, 1);
    table()["cvta.param." + bits] = plain(into_window<kParamWindow>, 1);
    table()["cvta.global." + bits] = plain(into_window<0>, 1);
    for (const std::string space : {"shared", "global", "param"}) {
      table()["cvta.to." + space + "." + bits] = plain(out_of_window, 1);
    }
  }
}

// cp.async: [to], [from], bytes (, bytes that are read, or a predicate that holds where none is)
void copy(Warp& w, const Instruction& i, uint32_t mask) {
  Block& block = w.block();
  each_lane(mask, [&](int lane) {
    const auto to = static_cast<uint32_t>(w.reg(i.from[0])[lane] + i.offset);
    const uint64_t from = w.reg(i.from[1])[lane] + i.offset2;
    const int given = i.from.size() > 2 ? static_cast<int>(w.reg(i.from[2])[lane]) : i.bytes;
    const int copied = !i.ignores ? given : given != 0 ? 0 : i.bytes;
    if (copied < 0 || copied > i.bytes) throw Fault("a copy reads more bytes than it writes");
    if (from % i.bytes != 0) throw Fault("a copy from a misaligned address");
    for (int at = 0; at < copied; at += copied - at < 4 ? 1 : 4) {
      block.launch.global->read(from + at, copied - at < 4 ? 1 : 4, w.accessor(lane));
    }
    block.shared.start_copy(to, i.bytes, w.thread(lane));
    LaneCopies& copies = w.copies[lane];
    copies.pending.push_back({to, from, i.bytes, copied, copies.group, copies.number++});
  });
}
void commit_copies(Warp& w, const Instruction&, uint32_t mask) {
  each_lane(mask, [&](int lane) { ++w.copies[lane].group; });
}
void wait_copies(Warp& w, const Instruction& i, uint32_t mask) {
  each_lane(mask, [&](int lane) {
    const uint64_t group = w.copies[lane].group, left = static_cast<uint64_t>(i.immediate);
    if (group > left) w.land(lane, group - left, ~uint64_t{0});
  });
}
void wait_all_copies(Warp& w, const Instruction&, uint32_t mask) {
  each_lane(mask, [&](int lane) { w.land(lane, ~uint64_t{0}, ~uint64_t{0}); });
}

void init_mbarrier(Warp& w, const Instruction& i, uint32_t mask) {
  each_lane(mask, [&](int lane) {
    const auto address = static_cast<uint32_t>(w.reg(i.from[0])[lane] + i.offset);
    const auto count = static_cast<int>(w.reg(i.from[1])[lane]);
    if (count <= 0) throw Fault("an mbarrier for " + std::to_string(count) + " arrivals");
    w.block().shared.write(address, 8, w.thread(lane));
    Block& block = w.block();
    const auto others = static_cast<int>(block.mbarriers.size());
    const auto [entry, added] = block.mbarriers.try_emplace(address);
    if (added && block.kernel.has_bulk && others >= block.clocks.barriers()) {
      throw Fault("more mbarriers than the executor has clocks for");
    }
    Mbarrier made;
    made.count = made.pending = count;
    made.clock_number = added ? block.clocks.threads() + others : entry->second.clock_number;
    made.clock = entry->second.clock;
    entry->second = made;
  });
}
void arrive(Warp& w, const Instruction& i, uint32_t mask) {
  each_lane(mask, [&](int lane) {
    w.block().arrive(static_cast<uint32_t>(w.reg(i.from[0])[lane] + i.offset), w.thread(lane));
  });
}
void arrive_expecting(Warp& w, const Instruction& i, uint32_t mask) {
  each_lane(mask, [&](int lane) {
    const auto bytes = static_cast<int64_t>(w.reg(i.from[1])[lane] & 0xffffffffu);
    if (bytes >= 1 << 20) throw Fault("an mbarrier counts fewer bytes than 2^20");
    w.block().arrive(static_cast<uint32_t>(w.reg(i.from[0])[lane] + i.offset), w.thread(lane), bytes);
  });
}
// cp.async.bulk: [to], [from], bytes, [mbarrier]
void copy_bulk(Warp& w, const Instruction& i, uint32_t mask) {
  Block& block = w.block();
  each_lane(mask, [&](int lane) {
    const auto to = static_cast<uint32_t>(w.reg(i.from[0])[lane] + i.offset);
    const uint64_t from = w.reg(i.from[1])[lane] + i.offset2;
    const auto bytes = static_cast<int>(w.reg(i.from[2])[lane]);
    const auto address = static_cast<uint32_t>(w.reg(i.from[3])[lane] + i.immediate);
    if (bytes <= 0 || bytes % 16 != 0) throw Fault("a bulk copy has a multiple of 16 bytes");
    block.mbarrier(address, w.thread(lane));
    block.shared.check_async_object(address, 8, w.thread(lane));
    for (int at = 0; at < bytes; at += 16) block.launch.global->read(from + at, 16, w.accessor(lane));
    block.shared.start_bulk_copy(to, bytes, w.thread(lane));
    block.bulk_copies.push_back({to, from, bytes, address});
  });
}
void arrive_behind_copies(Warp& w, const Instruction& i, uint32_t mask) {
  each_lane(mask, [&](int lane) {
    const auto address = static_cast<uint32_t>(w.reg(i.from[0])[lane] + i.offset);
    w.block().mbarrier(address, w.thread(lane));
    w.block().arrivals.push_back({w.number_, lane, w.copies[lane].number, address});
  });
}

void fence_proxies(Warp& w, const Instruction&, uint32_t mask) {
  each_lane(mask, [&](int lane) { w.block().clocks.fence(w.thread(lane)); });
}

void sync_warp(Warp& w, const Instruction& i, uint32_t mask) {
  if ((static_cast<uint32_t>(w.reg(i.from[0])[0]) & w.live()) != w.live())
    throw Fault("a barrier for a part of a warp");
  std::vector<int> threads;
  each_lane(mask, [&](int lane) { threads.push_back(w.thread(lane)); });
  w.block().clocks.join(threads);
}

enum class Shuffle { kIndex, kButterfly, kDown, kUp };
template <Shuffle kHow>
void shuffle(Warp& w, const Instruction& i, uint32_t mask) {
  Lanes source;
  std::memcpy(source, w.reg(i.from[0]), sizeof source);
  each_lane(mask, [&](int lane) {
    const auto by = static_cast<int>(w.reg(i.from[1])[lane] & 31), c = static_cast<int>(w.reg(i.from[2])[lane]);
    const auto members = static_cast<uint32_t>(w.reg(i.from[3])[lane]);
    if ((members & w.live()) != w.live()) throw Fault("a shuffle of a part of a warp");
    const int clamp = c & 31, segment = c >> 8 & 31, most = (lane & segment) | (clamp & ~segment),
              least = lane & segment;
    int from = lane;
    bool inside = true;
    if (kHow == Shuffle::kIndex) {
      from = least | (by & ~segment), inside = from <= most;
    } else if (kHow == Shuffle::kButterfly) {
      from = lane ^ by, inside = from <= most;
    } else if (kHow == Shuffle::kDown) {
      from = lane + by, inside = from <= most;
    } else {
      from = lane - by, inside = from >= most;
    }
    if (!inside) from = lane;
    if ((mask >> from & 1) == 0) throw Fault("a shuffle from a lane that has ended");
    w.reg(i.to[0])[lane] = source[from] & 0xffffffffu;
    if (i.to.size() > 1 && i.to[1] >= 0) w.reg(i.to[1])[lane] = inside;
  });
}

void set_registers(Warp& w, const Instruction& i, uint32_t) {
  const auto wanted = static_cast<int>(i.immediate);
  if (wanted % 8 != 0 || wanted < 24 || wanted > 256) throw Fault("a number of registers that there is not");
  Block& block = w.block();
  const int more = wanted - w.maximum_registers;
  if (i.is_signed ? more > 0 : more < 0) throw Fault("registers change the other way than the instruction says");
  if (more > block.free_registers) {
    w.blocked = true;
    return;
  }
  block.free_registers -= more;
  w.maximum_registers = wanted;
  if (more >= 0) return;
  for (const auto& other : block.warps) {
    for (Fragment& f : other->fragments) {
      if (f.state == State::kAtRegisters) f.state = State::kReady;
    }
  }
}

Builder at_address(Function run, size_t more, Kind kind = Kind::kPlain) {
  return [=](const std::vector<Operand>& operands, Instruction& to) {
    if (operands.size() != more + 1 || operands[0].form != Operand::kAddress) throw Fault("expected an address");
    to.run = run;
    to.kind = kind;
    to.from = {operands[0].reg};
    to.offset = operands[0].offset;
    for (size_t i = 1; i <= more; ++i) to.from.push_back(register_of(operands[i]));
  };
}
// Instructions without registers; their only operand, if any, is a number.
Builder alone(Function run, Kind kind, bool number = false) {
  return [=](const std::vector<Operand>& operands, Instruction& to) {
    if (operands.size() != (number ? 1 : 0) || (number && !operands[0].constant)) throw Fault("expected a number");
    to.run = run;
    to.kind = kind;
    if (number) to.immediate = operands[0].value;
  };
}

void add_synchronisation() {
  auto& to = table();
  const Builder barrier = [](const std::vector<Operand>& operands, Instruction& made) {
    made.kind = Kind::kBarrier;
    for (const Operand& operand : operands) made.from.push_back(register_of(operand));
  };
  to["bar.sync"] = to["barrier.sync.aligned"] = barrier;
  to["bar.warp.sync"] = [](const std::vector<Operand>& operands, Instruction& made) {
    made.kind = Kind::kConverged;
    made.run = sync_warp;
    made.from = {register_of(operands.at(0))};
  };
  const Builder branch = [](const std::vector<Operand>& operands, Instruction& made) {
    if (operands.size() != 1 || operands[0].form != Operand::kLabel) throw Fault("expected a label");
    made.kind = Kind::kBranch;
  };
  to["bra"] = to["bra.uni"] = branch;
  to["ret"] = to["exit"] = alone(nullptr, Kind::kReturn);
  to["trap"] = alone(nullptr, Kind::kTrap);
  const Builder copies = [](const std::vector<Operand>& operands, Instruction& made) {
    if (operands.size() < 3 || operands.size() > 4 || operands[0].form != Operand::kAddress ||
        operands[1].form != Operand::kAddress || !operands[2].constant) {
      throw Fault("expected two addresses and a number of bytes");
    }
    made.run = copy;
    made.bytes = static_cast<uint8_t>(operands[2].value);
    made.from = {operands[0].reg, operands[1].reg};
    made.offset = operands[0].offset;
    made.offset2 = operands[1].offset;
    if (operands.size() > 3) made.from.push_back(register_of(operands[3]));
    made.ignores = operands.size() > 3 && operands[3].predicate;
  };
  to["cp.async.ca.shared.global"] = copies;
  to["cp.async.cg.shared.global"] = [=](const std::vector<Operand>& operands, Instruction& made) {
    copies(operands, made);
    if (made.bytes != 16) throw Fault("a copy past the first cache has 16 bytes");
  };
  to["cp.async.commit_group"] = alone(commit_copies, Kind::kPlain);
  to["cp.async.wait_group"] = alone(wait_copies, Kind::kPlain, true);
  to["cp.async.wait_all"] = alone(wait_all_copies, Kind::kPlain);
  to["mbarrier.init.shared.b64"] = at_address(init_mbarrier, 1);
  to["mbarrier.arrive.shared.b64"] = [](const std::vector<Operand>& operands, Instruction& made) {
    if (operands.size() != 2 || operands[0].form != Operand::kSink) throw Fault("expected _ and an address");
    at_address(arrive, 0)({operands[1]}, made);
  };
  to["mbarrier.arrive.expect_tx.shared.b64"] = [](const std::vector<Operand>& operands, Instruction& made) {
    if (operands.size() != 3 || operands[0].form != Operand::kSink) throw Fault("expected _, an address and bytes");
    at_address(arrive_expecting, 1)({operands[1], operands[2]}, made);
  };
  to["cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"] = [](const std::vector<Operand>& operands,
                                                                               Instruction& made) {
    const auto address = [&](size_t k) { return operands[k].form == Operand::kAddress; };
    if (operands.size() != 4 || !address(0) || !address(1) || !address(3)) {
      throw Fault("expected two addresses, a number of bytes and an mbarrier");
    }
    made.run = copy_bulk;
    made.from = {operands[0].reg, operands[1].reg, register_of(operands[2]), operands[3].reg};
    made.offset = operands[0].offset;
    made.offset2 = operands[1].offset;
    made.immediate = operands[3].offset;
  };
  to["mbarrier.try_wait.parity.shared.b64"] = [](const std::vector<Operand>& operands, Instruction& made) {
    if (operands.size() < 3) throw Fault("expected a predicate, an address and a parity");
    at_address(nullptr, 1, Kind::kTryWait)({operands[1], operands[2]}, made);
    made.to = {register_of(operands[0])};
  };
  to["cp.async.mbarrier.arrive.noinc.shared.b64"] = at_address(arrive_behind_copies, 0);
  to["fence.proxy.async.shared"] = to["fence.proxy.async"] = alone(fence_proxies, Kind::kPlain);
  to["setmaxnreg.inc.sync.aligned.u32"] = alone(set_registers, Kind::kConverged, true);
  to["setmaxnreg.dec.sync.aligned.u32"] = [](const std::vector<Operand>& operands, Instruction& made) {
    alone(set_registers, Kind::kConverged, true)(operands, made);
    made.is_signed = true;
  };
  const auto add_shuffle = [&](const std::string& name, Function run) {
    to["shfl.sync." + name + ".b32"] = [=](const std::vector<Operand>& operands, Instruction& made) {
      if (operands.size() != 5 && operands.size() != 6) throw Fault("expected 5 or 6 operands");
      made.kind = Kind::kConverged;
      made.run = run;
      const size_t results = operands.size() - 4;
      for (size_t k = 0; k < operands.size(); ++k) {
        (k < results ? made.to : made.from).push_back(register_of(operands[k]));
      }
    };
  };
  add_shuffle("idx", shuffle<Shuffle::kIndex>);
  add_shuffle("bfly", shuffle<Shuffle::kButterfly>);
  add_shuffle("down", shuffle<Shuffle::kDown>);
  add_shuffle("up", shuffle<Shuffle::kUp>);
}

void fill_table() {
  if (!table().empty()) return;
  add_arithmetic();
  add_memory();
  add_synchronisation();
}

}  // namespace

bool build(const std::string& spelling, const std::vector<Operand>& operands, Instruction& to) {
  fill_table();
  std::string plain_spelling = spelling;
  // One block has no others in its cluster.
  if (const size_t at = plain_spelling.find("::cta"); at != std::string::npos) plain_spelling.erase(at, 5);
  if (build_tensor(plain_spelling, operands, to)) return true;
  const auto found = table().find(plain_spelling);
  if (found == table().end()) return false;
  found->second(operands, to);
  return true;
}

std::vector<std::string> known_spellings() {
  fill_table();
  std::vector<std::string> names;
  for (const auto& entry : table()) names.push_back(entry.first);
  for (const std::string& name : tensor_spellings()) names.push_back(name);
  return names;
}

}  // namespace ptx
