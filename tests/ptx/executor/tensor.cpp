// Tensor cores: which lane holds which element, where a descriptor says that an operand lies, and the sums.
//
// Products of 16-bit and TF32 elements are exact in double. With the default option a sum of products and the
// accumulator is rounded once, to the nearest float; with `truncate` it is cut towards zero after every 16 bytes of
// depth, which is what GPUs do at their worst.
#include "tensor.h"

#include <array>
#include <cmath>
#include <functional>

#include "lanes.h"

namespace ptx {
namespace {

enum class Element { kHalf, kBFloat16, kTf32 };

float element(Element kind, uint32_t bits) {
  return kind == Element::kHalf       ? from_half(static_cast<uint16_t>(bits))
         : kind == Element::kBFloat16 ? from_bfloat16(static_cast<uint16_t>(bits))
                                      : to_tf32_bits(bits);
}

float towards_zero(double value) {
  auto rounded = static_cast<float>(value);
  if (std::isfinite(rounded) && std::fabs(static_cast<double>(rounded)) > std::fabs(value)) {
    rounded = std::nextafterf(rounded, 0.0f);
  }
  return rounded;
}

// sums (rows x columns) += a (rows x depth) times b (depth x columns).
void multiply(float* sums, const float* a, const float* b, int rows, int columns, int depth, bool truncate, int chunk) {
  std::vector<double> line(columns);
  for (int m = 0; m < rows; ++m) {
    float* c = sums + m * columns;
    for (int first = 0; first < depth; first += truncate ? chunk : depth) {
      for (int n = 0; n < columns; ++n) line[n] = c[n];
      for (int k = first; k < (truncate ? first + chunk : depth); ++k) {
        const double left = a[m * depth + k];
        for (int n = 0; n < columns; ++n) line[n] += left * b[k * columns + n];
      }
      for (int n = 0; n < columns; ++n) c[n] = truncate ? towards_zero(line[n]) : static_cast<float>(line[n]);
    }
  }
}

// Fragments: lane l holds row l / 4, and columns from l % 4 on.
constexpr int group(int lane) { return lane / 4; }
constexpr int place(int lane) { return lane % 4; }

// A of 16 rows, from four registers.
void read_a(Warp& w, const int* registers, Element kind, float* a) {
  const int depth = kind == Element::kTf32 ? 8 : 16;
  for (int r = 0; r < 4; ++r) {
    const uint64_t* values = w.reg(registers[r]);
    for (int lane = 0; lane < kLanes; ++lane) {
      const int row = group(lane) + r % 2 * 8;
      const auto bits = static_cast<uint32_t>(values[lane]);
      if (kind == Element::kTf32) {
        a[row * depth + place(lane) + r / 2 * 4] = element(kind, bits);
      } else {
        const int k = 2 * place(lane) + r / 2 * 8;
        a[row * depth + k] = element(kind, bits & 0xffff);
        a[row * depth + k + 1] = element(kind, bits >> 16);
      }
    }
  }
}

// Sums of 16 rows; four registers for every 8 columns.
void read_sums(Warp& w, const int* registers, int columns, float* sums) {
  for (int r = 0; r < columns / 2; ++r) {
    const uint64_t* values = w.reg(registers[r]);
    for (int lane = 0; lane < kLanes; ++lane) {
      const int row = group(lane) + r % 4 / 2 * 8, column = r / 4 * 8 + 2 * place(lane) + r % 2;
      sums[row * columns + column] = Raw<float>::read(values[lane]);
    }
  }
}
void write_sums(Warp& w, const int* registers, int columns, const float* sums) {
  for (int r = 0; r < columns / 2; ++r) {
    uint64_t* values = w.reg(registers[r]);
    for (int lane = 0; lane < kLanes; ++lane) {
      const int row = group(lane) + r % 4 / 2 * 8, column = r / 4 * 8 + 2 * place(lane) + r % 2;
      values[lane] = Raw<float>::write(sums[row * columns + column]);
    }
  }
}

void need_whole_warp(uint32_t mask) {
  if (mask != kAllLanes) throw Fault("a part of a warp runs an instruction of the whole");
}

// from: a0..a3, b0, b1, c0..c3
template <Element kKind>
void mma(Warp& w, const Instruction& i, uint32_t mask) {
  need_whole_warp(mask);
  constexpr int kDepth = kKind == Element::kTf32 ? 8 : 16;
  float a[16 * kDepth], b[kDepth * 8], c[16 * 8];
  read_a(w, &i.from[0], kKind, a);
  for (int r = 0; r < 2; ++r) {
    const uint64_t* values = w.reg(i.from[4 + r]);
    for (int lane = 0; lane < kLanes; ++lane) {
      const auto bits = static_cast<uint32_t>(values[lane]);
      const int n = group(lane);
      if (kKind == Element::kTf32) {
        b[(place(lane) + r * 4) * 8 + n] = element(kKind, bits);
      } else {
        const int k = 2 * place(lane) + r * 8;
        b[k * 8 + n] = element(kKind, bits & 0xffff);
        b[(k + 1) * 8 + n] = element(kKind, bits >> 16);
      }
    }
  }
  read_sums(w, &i.from[6], 8, c);
  multiply(c, a, b, 16, 8, kDepth, w.block().launch.options.truncate, kDepth / 2);
  write_sums(w, i.to.data(), 8, c);
}

// Matrices of 8 rows of 16 bytes; lanes 8 m and up give the rows of matrix m.
template <bool kTransposed>
void load_matrices(Warp& w, const Instruction& i, uint32_t mask) {
  need_whole_warp(mask);
  Lanes base;
  std::memcpy(base, w.reg(i.from[0]), sizeof base);
  for (size_t m = 0; m < i.to.size(); ++m) {
    uint16_t elements[8][8];
    for (int row = 0; row < 8; ++row) {
      const int lane = static_cast<int>(m) * 8 + row;
      const uint8_t* from = w.block().shared.read(static_cast<uint32_t>(base[lane] + i.offset), 16, w.thread(lane));
      std::memcpy(elements[row], from, 16);
    }
    uint64_t* to = w.reg(i.to[m]);
    for (int lane = 0; lane < kLanes; ++lane) {
      const int x = group(lane), y = 2 * place(lane);
      const uint32_t low = kTransposed ? elements[y][x] : elements[x][y];
      const uint32_t high = kTransposed ? elements[y + 1][x] : elements[x][y + 1];
      to[lane] = high << 16 | low;
    }
  }
}

template <bool kTransposed>
void store_matrices(Warp& w, const Instruction& i, uint32_t mask) {
  need_whole_warp(mask);
  for (size_t m = 0; m + 1 < i.from.size(); ++m) {
    uint16_t elements[8][8];
    const uint64_t* from = w.reg(i.from[m + 1]);
    for (int lane = 0; lane < kLanes; ++lane) {
      const int x = group(lane), y = 2 * place(lane);
      const auto low = static_cast<uint16_t>(from[lane]), high = static_cast<uint16_t>(from[lane] >> 16);
      (kTransposed ? elements[y][x] : elements[x][y]) = low;
      (kTransposed ? elements[y + 1][x] : elements[x][y + 1]) = high;
    }
    for (int row = 0; row < 8; ++row) {
      const int lane = static_cast<int>(m) * 8 + row;
      uint8_t* to =
          w.block().shared.write(static_cast<uint32_t>(w.reg(i.from[0])[lane] + i.offset), 16, w.thread(lane));
      std::memcpy(to, elements[row], 16);
    }
  }
}

// A matrix descriptor of wgmma: where element (row, k) of an operand lies. "Row" counts the rows of A, the columns of
// B.
struct Descriptor {
  uint32_t start, leading, stride;
  int swizzle;  // bytes of its span: 16 none, 32, 64, 128
  explicit Descriptor(uint64_t bits)
      : start(static_cast<uint32_t>(bits & 0x3fff) << 4),
        leading(static_cast<uint32_t>(bits >> 16 & 0x3fff) << 4),
        stride(static_cast<uint32_t>(bits >> 32 & 0x3fff) << 4) {
    constexpr int kSpans[] = {16, 128, 64, 32};
    swizzle = kSpans[bits >> 62];
    if (bits >> 49 & 7) throw Fault("a descriptor with a base offset: patterns here begin at multiples of their size");
    if ((bits & 0x3000c000c000c000u) != 0 || (bits >> 52 & 0x3ff) != 0) {
      throw Fault("a descriptor with bits that mean nothing");
    }
  }
  uint32_t exchanged(uint32_t address) const {
    const uint32_t mask = static_cast<uint32_t>(swizzle / 16 - 1);
    return address ^ ((address >> 7 & mask) << 4);
  }
  // Offset of 16 bytes that hold (row, k) where k runs along the 16 bytes; `bytes` of an element.
  uint32_t by_depth(int row, int byte_of_depth) const {
    uint32_t at = start + row / 8 * stride;
    if (swizzle == 16) {
      at += row % 8 * 16 + byte_of_depth / 16 * leading;
    } else {
      at += row % 8 * swizzle + byte_of_depth;
    }
    return exchanged(at);
  }
  // The same where rows run along the 16 bytes, of 2-byte elements.
  uint32_t by_rows(int row, int depth) const {
    const int span = swizzle / 2;  // rows
    uint32_t at = start;
    if (swizzle == 16) {
      at += row / 8 * stride + depth / 8 * leading + depth % 8 * 16;
    } else {
      at += row / span * leading + depth / 8 * stride + depth % 8 * swizzle + row % span * 2;
    }
    return exchanged(at);
  }
};

// Reads an operand of `rows` from row `first` on; element (r, k) goes to to[r * row_step + k * depth_step].
void read_operand(Warp& w, uint64_t bits, Element kind, bool transposed, int first, int rows, float* to, int row_step,
                  int depth_step, ProductGroup& group_of) {
  const Descriptor from(bits);
  const int element_bytes = kind == Element::kTf32 ? 4 : 2, depth = 32 / element_bytes;
  const auto chunk = [&](uint32_t address) {
    // A descriptor holds 18 bits of an address, all that shared memory has.
    const uint8_t* data = w.block().shared.start_async_read(address, 16, w.thread(0));
    group_of.reads.emplace_back(address, 16);
    return data;
  };
  const int each = 16 / element_bytes;
  const auto value = [&](const uint8_t* data, int e) {
    uint32_t raw = 0;
    std::memcpy(&raw, data + e * element_bytes, element_bytes);
    return element(kind, raw);
  };
  if (!transposed) {
    for (int r = 0; r < rows; ++r) {
      for (int part = 0; part < 2; ++part) {
        const uint8_t* data = chunk(from.by_depth(first + r, part * 16));
        for (int e = 0; e < each; ++e) to[r * row_step + (part * each + e) * depth_step] = value(data, e);
      }
    }
  } else {
    for (int k = 0; k < depth; ++k) {
      for (int r = 0; r < rows; r += each) {
        const uint8_t* data = chunk(from.by_rows(first + r, k));
        for (int e = 0; e < each; ++e) to[(r + e) * row_step + k * depth_step] = value(data, e);
      }
    }
  }
}

// wgmma: this warp's 16 of the 64 rows. immediate: columns | element << 16 | A transposed << 20 | B transposed << 21 |
// A from registers << 22. from: predicate, B, A (one descriptor, or four registers); to: the sums.
void warpgroup_mma(Warp& w, const Instruction& i, uint32_t mask) {
  need_whole_warp(mask);
  const int columns = i.immediate & 0xffff;
  const auto kind = static_cast<Element>(i.immediate >> 16 & 15);
  const bool turned_a = i.immediate >> 20 & 1, turned_b = i.immediate >> 21 & 1, from_registers = i.immediate >> 22 & 1;
  const int depth = kind == Element::kTf32 ? 8 : 16;
  if (w.product_groups.empty() || w.product_groups.back().number != w.open_products) {
    w.product_groups.push_back({w.open_products, {}});
  }
  ProductGroup& group_of = w.product_groups.back();
  std::vector<float> a(16 * depth), b(static_cast<size_t>(depth) * columns), sums(16 * static_cast<size_t>(columns));
  const auto same = [&](int r) {
    const uint64_t* values = w.reg(r);
    for (int lane = 1; lane < kLanes; ++lane) {
      if (values[lane] != values[0]) throw Fault("lanes differ about a descriptor");
    }
    return values[0];
  };
  if (from_registers) {
    for (int r = 2; r < 6; ++r) {
      if (w.touched[i.from[r]]) {
        throw Fault("register " + w.block().kernel.register_names[i.from[r]] +
                    " was written after the last wgmma.fence");
      }
    }
    read_a(w, &i.from[2], kind, a.data());
  } else {
    read_operand(w, same(i.from[2]), kind, turned_a, w.number_ % 4 * 16, 16, a.data(), depth, 1, group_of);
  }
  read_operand(w, same(i.from[1]), kind, turned_b, 0, columns, b.data(), 1, columns, group_of);
  for (const int r : i.to) {
    // Sums of a product under way may be added to by the next one.
    if (w.touched[r]) {
      throw Fault("register " + w.block().kernel.register_names[r] + " was written after the last wgmma.fence");
    }
  }
  if (same(i.from[0]) & 1) {
    for (const int r : i.to) {
      if (w.pending[r] == 0 && w.defined[r] != kAllLanes) {
        throw Fault("register " + w.block().kernel.register_names[r] + " has no value");
      }
    }
    read_sums(w, i.to.data(), columns, sums.data());
  }
  multiply(sums.data(), a.data(), b.data(), 16, columns, depth, w.block().launch.options.truncate, depth / 2);
  write_sums(w, i.to.data(), columns, sums.data());
  for (const int r : i.to) {
    w.pending[r] = w.open_products;
    w.defined[r] = 0;
  }
}

void fence_products(Warp& w, const Instruction&, uint32_t) { std::fill(w.touched.begin(), w.touched.end(), 0); }
void commit_products(Warp& w, const Instruction&, uint32_t) {
  if (w.product_groups.empty() || w.product_groups.back().number != w.open_products) {
    w.product_groups.push_back({w.open_products, {}});
  }
  ++w.open_products;
}
void wait_products(Warp& w, const Instruction& i, uint32_t) { w.finish_products(static_cast<size_t>(i.immediate)); }

void add_members(const Operand& operand, size_t count, std::vector<int>& to) {
  if (operand.form != Operand::kVector || operand.members.size() != count) {
    throw Fault("expected a vector of " + std::to_string(count) + " registers");
  }
  for (const int r : operand.members) to.push_back(r);
}

bool build_mma(const std::string& spelling, const std::vector<Operand>& operands, Instruction& to) {
  const std::pair<const char*, Function> shapes[] = {
      {"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", mma<Element::kHalf>},
      {"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", mma<Element::kBFloat16>},
      {"mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", mma<Element::kTf32>}};
  for (const auto& [name, run] : shapes) {
    if (spelling != name) continue;
    to.run = run;
    to.kind = Kind::kConverged;
    add_members(operands.at(0), 4, to.to);
    add_members(operands.at(1), 4, to.from);
    add_members(operands.at(2), 2, to.from);
    add_members(operands.at(3), 4, to.from);
    return true;
  }
  return false;
}

bool build_matrices(const std::string& spelling, const std::vector<Operand>& operands, Instruction& to) {
  for (const int count : {1, 2, 4}) {
    for (const bool transposed : {false, true}) {
      const std::string end =
          ".sync.aligned.m8n8.x" + std::to_string(count) + (transposed ? ".trans" : "") + ".shared.b16";
      const bool is_load = spelling == "ldmatrix" + end;
      if (!is_load && spelling != "stmatrix" + end) continue;
      const Operand& address = operands.at(is_load ? 1 : 0);
      const Operand& data = operands.at(is_load ? 0 : 1);
      if (address.form != Operand::kAddress) throw Fault("expected an address");
      to.kind = Kind::kConverged;
      to.offset = address.offset;
      to.from = {address.reg};
      std::vector<int>& list = is_load ? to.to : to.from;
      if (count == 1 && data.form == Operand::kRegister) {
        list.push_back(data.reg);
      } else {
        add_members(data, count, list);
      }
      to.run = is_load ? (transposed ? load_matrices<true> : load_matrices<false>)
                       : (transposed ? store_matrices<true> : store_matrices<false>);
      return true;
    }
  }
  return false;
}

bool build_wgmma(const std::string& spelling, const std::vector<Operand>& operands, Instruction& to) {
  to.kind = Kind::kConverged;
  if (spelling == "wgmma.fence.sync.aligned") {
    to.run = fence_products;
    return true;
  }
  if (spelling == "wgmma.commit_group.sync.aligned") {
    to.run = commit_products;
    return true;
  }
  if (spelling == "wgmma.wait_group.sync.aligned") {
    to.run = wait_products;
    to.immediate = operands.at(0).value;
    return true;
  }
  const std::string head = "wgmma.mma_async.sync.aligned.m64n";
  if (spelling.rfind(head, 0) != 0) return false;
  size_t used = 0;
  const int columns = std::stoi(spelling.substr(head.size()), &used);
  const std::string end = spelling.substr(head.size() + used);
  const std::pair<const char*, Element> kinds[] = {{"k16.f32.f16.f16", Element::kHalf},
                                                   {"k16.f32.bf16.bf16", Element::kBFloat16},
                                                   {"k8.f32.tf32.tf32", Element::kTf32}};
  for (const auto& [name, kind] : kinds) {
    if (end != name) continue;
    if (columns % 8 != 0 || columns < 8 || columns > 256) throw Fault("a product of columns that there is not");
    add_members(operands.at(0), columns / 2, to.to);
    const bool from_registers = operands.at(1).form == Operand::kVector, words = kind == Element::kTf32;
    const size_t expected = words ? 6 : from_registers ? 7 : 8;
    if (operands.size() != expected) throw Fault("expected " + std::to_string(expected) + " operands");
    if (operands[4].value != 1 || operands[5].value != 1) throw Fault("a product with operands that are negated");
    to.from = {operands[3].reg, operands[2].reg};
    if (from_registers) {
      add_members(operands[1], 4, to.from);
    } else {
      to.from.push_back(operands[1].reg);
    }
    const int64_t turned_a = words || from_registers ? 0 : operands[6].value;
    const int64_t turned_b = words ? 0 : operands.back().value;
    to.immediate = columns | static_cast<int64_t>(kind) << 16 | turned_a << 20 | turned_b << 21 |
                   static_cast<int64_t>(from_registers) << 22;
    to.run = warpgroup_mma;
    to.kind = Kind::kProduct;
    return true;
  }
  return false;
}

}  // namespace

bool build_tensor(const std::string& spelling, const std::vector<Operand>& operands, Instruction& to) {
  const auto starts = [&](const char* with) { return spelling.rfind(with, 0) == 0; };
  if (starts("mma.")) return build_mma(spelling, operands, to);
  if (starts("ldmatrix.") || starts("stmatrix.")) return build_matrices(spelling, operands, to);
  if (starts("wgmma.")) return build_wgmma(spelling, operands, to);
  return false;
}

std::vector<std::string> tensor_spellings() {
  return {"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
          "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
          "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32",
          "ldmatrix.sync.aligned.m8n8.x{1,2,4}[.trans].shared.b16",
          "stmatrix.sync.aligned.m8n8.x{1,2,4}[.trans].shared.b16",
          "wgmma.fence.sync.aligned",
          "wgmma.commit_group.sync.aligned",
          "wgmma.wait_group.sync.aligned",
          "wgmma.mma_async.sync.aligned.m64nNk16.f32.{f16.f16,bf16.bf16}",
          "wgmma.mma_async.sync.aligned.m64nNk8.f32.tf32.tf32"};
}

}  // namespace ptx
