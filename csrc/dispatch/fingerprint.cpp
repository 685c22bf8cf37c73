// Fingerprints of memory.
#include "dispatch/fingerprint.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <vector>

namespace bap_kernels {
namespace {

constexpr uint64_t kOdd = 0x9e3779b97f4a7c15ull;
// Below this a second thread costs more to wake than it saves.
constexpr int64_t kBytesPerTask = 128 * 1024;

// One to one in `lane` for each word and in `word` for each lane. The rotation brings the top bits, which a product
// alone leaves at the top, to where the next product spreads them: else two changed signs could cancel.
inline uint64_t mixed(uint64_t lane, uint64_t word) { return std::rotl((lane ^ word) * kOdd, 29); }

}  // namespace

Fingerprint fingerprint_bytes(const void* data, int64_t bytes, uint64_t seed) {
  const auto start = [&](uint64_t i) { return mixed(seed + i, static_cast<uint64_t>(bytes)); };
  // By name, as compilers keep these in registers, and an array in memory: 28 GB/s instead of 16.
  uint64_t a = start(0), b = start(1), c = start(2), d = start(3);
  uint64_t e = start(4), f = start(5), g = start(6), h = start(7);
  const auto step = [&](const char* p) {
    const auto word = [&](int i) {
      uint64_t value;
      std::memcpy(&value, p + i * sizeof(value), sizeof(value));
      return value;
    };
    a = mixed(a, word(0)), b = mixed(b, word(1)), c = mixed(c, word(2)), d = mixed(d, word(3));
    e = mixed(e, word(4)), f = mixed(f, word(5)), g = mixed(g, word(6)), h = mixed(h, word(7));
  };
  const auto* p = static_cast<const char*>(data);
  constexpr int64_t kStep = sizeof(Fingerprint);
  for (; bytes >= kStep; bytes -= kStep, p += kStep) step(p);
  if (bytes > 0) {
    char last[kStep] = {};
    std::memcpy(last, p, bytes);
    step(last);
  }
  return {a, b, c, d, e, f, g, h};
}

bool has_dense_rows(const at::Tensor& t) {
  if (t.dim() == 0 || t.numel() == 0) return true;
  // By the other axes from the innermost on: each begins where the ones within it end.
  std::vector<int64_t> axes;
  for (int64_t axis = 1; axis < t.dim(); ++axis) {
    if (t.size(axis) != 1) axes.push_back(axis);
  }
  std::sort(axes.begin(), axes.end(), [&](int64_t a, int64_t b) { return t.stride(a) < t.stride(b); });
  int64_t step = 1;
  for (const int64_t axis : axes) {
    if (t.stride(axis) != step) return false;
    step *= t.size(axis);
  }
  return true;
}

Fingerprint fingerprint_rows(const at::Tensor& t, const OptionalTensor& rows) {
  const int32_t* listed = has_value(rows) ? rows->const_data_ptr<int32_t>() : nullptr;
  const int64_t count = t.numel() == 0 ? 0 : listed ? rows->numel() : t.size(0);
  if (count == 0) return fingerprint_bytes(nullptr, 0);
  const auto* data = static_cast<const char*>(t.const_data_ptr());
  const int64_t element = static_cast<int64_t>(t.element_size());
  const int64_t bytes = t.numel() / t.size(0) * element, step = t.stride(0) * element;
  if (!listed && step == bytes && count * bytes <= kBytesPerTask) return fingerprint_bytes(data, count * bytes);
  // Tasks are cut by size alone, and their fingerprints put together in order.
  const int64_t rows_per_task = std::max<int64_t>(1, kBytesPerTask / bytes);
  const int64_t tasks = (count + rows_per_task - 1) / rows_per_task;
  std::vector<Fingerprint> parts(tasks);
  at::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      Fingerprint part{};
      const int64_t end = std::min(count, (task + 1) * rows_per_task);
      for (int64_t row = task * rows_per_task; row < end; ++row) {
        const char* p = data + (listed ? listed[row] : row) * step;
        const Fingerprint one = fingerprint_bytes(p, bytes, static_cast<uint64_t>(row));
        for (size_t i = 0; i < part.size(); ++i) part[i] = mixed(part[i], one[i]);
      }
      parts[task] = part;
    }
  });
  return fingerprint_bytes(parts.data(), tasks * static_cast<int64_t>(sizeof(Fingerprint)));
}

Fingerprint fingerprint_values(const at::Tensor& t) {
  const int64_t bytes = t.numel() * static_cast<int64_t>(t.element_size());
  // Most are short vectors, for which what follows would take longer than reading them.
  if (bytes > 0 && bytes <= kBytesPerTask && t.is_contiguous()) return fingerprint_bytes(t.const_data_ptr(), bytes);
  return fingerprint_rows(t.dim() == 0 ? t.view({1}) : t.contiguous(), std::nullopt);
}

}  // namespace bap_kernels
