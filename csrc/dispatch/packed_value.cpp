// What a packed weight was made from.
#include "dispatch/packed_value.h"

#include <algorithm>
#include <cstring>

namespace bap_kernels {
namespace {

// Values compared in a sample: for 1,024 listed ones at most one cache line is read, beside the 16 at least of their
// packed form.
constexpr int64_t kFewestSamples = 16, kMostSamples = 256, kValuesPerSample = 1024;
// Of an entry, its nodes in the maps, a tensor with its storage, and what malloc adds to each.
constexpr int64_t kBookkeeping = 1280;
// What a reordered weight takes beside its numbers: it begins on a page of its own, and has a description.
constexpr int64_t kOfReordered = 5 * 1024;

// Bytes of a weight that oneDNN reordered; it has no storage to ask.
int64_t reordered_bytes(const at::Tensor& packed) {
  static const auto op = c10::Dispatcher::singleton().findSchema({"mkldnn::_nbytes", ""});
  if (op.has_value()) return op->typed<int64_t(const at::Tensor&)>().call(packed);
  // Blocks are of 16 channels at most.
  const auto up = [](int64_t n) { return (n + 15) / 16 * 16; };
  return up(packed.size(0)) * up(packed.size(1)) * packed.size(2) * packed.size(3) *
         static_cast<int64_t>(packed.element_size());
}

uint64_t read_value(const char* p, int64_t element) {
  uint64_t value = 0;
  std::memcpy(&value, p, element);
  return value;
}

}  // namespace

Sample::Sample(const ConvCall& c) : element(static_cast<int64_t>(c.weight.element_size())) {
  const at::Tensor& w = c.weight;
  const auto listed = [](const OptionalTensor& list) {
    return has_value(list) ? list->const_data_ptr<int32_t>() : nullptr;
  };
  const OptionalTensor all;
  const OptionalTensor& in_list = c.shape.depthwise ? all : c.weight_list();
  const int32_t *in = listed(in_list), *out = listed(c.out_index);
  const int64_t rows = out ? c.out_index->numel() : w.size(0), taps = w.size(2) * w.size(3);
  const int64_t in_row = (in ? in_list->numel() : w.size(1)) * taps;
  if (rows * in_row == 0) return;
  const int64_t count =
      std::min(rows * in_row, std::clamp(rows * in_row / kValuesPerSample, kFewestSamples, kMostSamples));
  const bool every = count == rows * in_row;
  for (int64_t i = 0; i < count; ++i) {
    // The golden ratio spreads the places within the rows.
    const int64_t row = every ? i / in_row : i * rows / count;
    const int64_t place = every ? i % in_row : static_cast<int64_t>((i * 0x9e3779b97f4a7c15ull >> 32) * in_row >> 32);
    const int64_t channel = place / taps, tap = place % taps;
    const int64_t offset = (out ? out[row] : row) * w.stride(0) + (in ? in[channel] : channel) * w.stride(1) +
                           tap / w.size(3) * w.stride(2) + tap % w.size(3) * w.stride(3);
    offsets.push_back(offset * element);
    values.push_back(read_value(static_cast<const char*>(w.const_data_ptr()) + offsets.back(), element));
  }
}

bool Sample::holds(const at::Tensor& weight) const {
  const auto* data = static_cast<const char*>(weight.const_data_ptr());
  // Without a branch between them, so that the reads overlap.
  uint64_t different = 0;
  const auto compare = [&](auto size) {
    for (size_t i = 0; i < offsets.size(); ++i) different |= read_value(data + offsets[i], size) ^ values[i];
  };
  if (element == 4) {
    compare(std::integral_constant<int64_t, 4>());
  } else if (element == 2) {
    compare(std::integral_constant<int64_t, 2>());
  } else {
    compare(element);
  }
  return different == 0;
}

PackedValue::List::List(const OptionalTensor& list) : given(has_value(list)) {
  if (!given) return;
  if (!list->is_cpu()) {
    on_device.emplace(*list);
    return;
  }
  const auto* p = list->const_data_ptr<int32_t>();
  values.resize(list->numel());
  for (size_t i = 0; i < values.size(); ++i) values[i] = p[static_cast<int64_t>(i) * list->stride(0)];
}

bool PackedValue::List::holds(const OptionalTensor& list) const {
  if (!given || !has_value(list)) return given == has_value(list);
  if (on_device.has_value()) return on_device->holds(*list);
  if (!list->is_cpu() || list->numel() != static_cast<int64_t>(values.size())) return false;
  const auto* p = list->const_data_ptr<int32_t>();
  const int64_t step = list->stride(0);
  if (step == 1 || values.empty()) return values.empty() || !std::memcmp(p, values.data(), values.size() * sizeof(*p));
  for (size_t i = 0; i < values.size(); ++i) {
    if (p[static_cast<int64_t>(i) * step] != values[i]) return false;
  }
  return true;
}

PackedValue::Vector::Vector(const OptionalTensor& vector) {
  if (!has_value(vector)) return;
  state.emplace(*vector);
  if (vector->is_cpu()) values = vector->detach().clone();
}

bool PackedValue::Vector::holds(const OptionalTensor& vector) const {
  if (!state.has_value() || !has_value(vector)) return state.has_value() == has_value(vector);
  if (!values.defined()) return state->holds(*vector);
  if (!vector->is_cpu() || vector->scalar_type() != values.scalar_type() || vector->numel() != values.numel()) {
    return false;
  }
  const at::Tensor dense = vector->contiguous();
  return dense.numel() == 0 || std::memcmp(dense.const_data_ptr(), values.const_data_ptr(), values.nbytes()) == 0;
}

std::vector<const OptionalTensor*> vectors_of(const ConvCall& c, PackedKind kind) {
  switch (kind) {
    case PackedKind::kSlicedFolded:
    case PackedKind::kZeroedFolded:
    case PackedKind::kReorderedFolded:
      return {c.fusion.only_scales_input() ? &c.fusion.in_scale : &kAbsent, &c.fusion.out_scale};
    case PackedKind::kBiasFolded:
      return {&c.bias, &c.fusion.out_scale, &c.fusion.out_shift};
    default:
      return {};
  }
}

uint64_t hash_lists(const ConvCall& c, PackedKind kind) {
  uint64_t hash = 0;
  const auto add = [&hash](const OptionalTensor& tensor) {
    if (!has_value(tensor)) {
      hash = hash * 31 + 1;
    } else if (!tensor->is_cpu()) {
      hash = hash * 31 + reinterpret_cast<uintptr_t>(tensor->unsafeGetTensorImpl());
    } else {
      const at::Tensor dense = tensor->contiguous();
      const auto bytes = static_cast<int64_t>(dense.nbytes());
      for (const uint64_t lane : fingerprint_bytes(bytes ? dense.const_data_ptr() : nullptr, bytes)) {
        hash = hash * 31 + lane;
      }
    }
  };
  for (const OptionalTensor* list : lists_of(c)) add(*list);
  for (const OptionalTensor* vector : vectors_of(c, kind)) add(*vector);
  return hash;
}

PackedValue::PackedValue(const ConvCall& c, PackedKind kind, PackedTrust trust)
    : weight(c.weight), lists{List(c.in_index), List(c.out_index), List(c.weight_index)} {
  for (const OptionalTensor* vector : vectors_of(c, kind)) vectors.emplace_back(*vector);
  if (!c.weight.is_cpu()) return;
  sample = Sample(c);
  has_whole = trust == PackedTrust::kWhole;
  if (has_whole) whole = fingerprint_rows(c.weight, c.out_index);
}

bool PackedValue::expired() const {
  const auto list_gone = [](const List& list) { return list.on_device.has_value() && list.on_device->expired(); };
  // Those on the CPU too, although equal values would do: whoever made them makes others the next time.
  const auto vector_gone = [](const Vector& vector) { return vector.state.has_value() && vector.state->expired(); };
  return weight.expired() || std::any_of(lists.begin(), lists.end(), list_gone) ||
         std::any_of(vectors.begin(), vectors.end(), vector_gone);
}

bool PackedValue::holds(const ConvCall& c, PackedKind kind, PackedTrust trust) const {
  if (!weight.holds(c.weight)) return false;
  const auto given = vectors_of(c, kind);
  for (size_t i = 0; i < vectors.size(); ++i) {
    if (!vectors[i].holds(*given[i])) return false;
  }
  const auto listed = lists_of(c);
  for (size_t i = 0; i < lists.size(); ++i) {
    if (!lists[i].holds(*listed[i])) return false;
  }
  if (!c.weight.is_cpu()) return trust == PackedTrust::kSample;
  if (trust == PackedTrust::kSample) return sample.holds(c.weight);
  return has_whole && whole == fingerprint_rows(c.weight, c.out_index);
}

std::vector<const void*> PackedValue::device_vectors() const {
  std::vector<const void*> addresses;
  for (const Vector& vector : vectors) {
    if (vector.on_device()) addresses.push_back(vector.state->impl._unsafe_get_target());
  }
  return addresses;
}

void PackedValue::count_bytes() {
  const at::Tensor t = packed.defined() ? packed.get() : at::Tensor();
  if (!t.defined()) {
    bytes = 0;
  } else if (t.has_storage()) {
    bytes = static_cast<int64_t>(t.storage().nbytes());
  } else {
    bytes = reordered_bytes(t) + kOfReordered;
  }
  for (const Vector& vector : vectors)
    bytes += vector.values.defined() ? static_cast<int64_t>(vector.values.nbytes()) : 0;
  bytes += kBookkeeping + static_cast<int64_t>(sample.offsets.size() * 2 * sizeof(int64_t));
  for (const List& list : lists) bytes += static_cast<int64_t>(list.values.size() * sizeof(int32_t));
}

}  // namespace bap_kernels
