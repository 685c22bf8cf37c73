// One packed weight with what it was made from, so that each use can see whether that still is what the weight holds.
#pragma once

#include <array>
#include <vector>

#include "dispatch/fingerprint.h"
#include "dispatch/packed_cache.h"
#include "dispatch/stream.h"
#include "dispatch/tensor_state.h"

namespace bap_kernels {

// Some values of a weight's listed slices, by their places in memory: the rows at even distances, the places in them
// spread. A write of the whole weight meets them for certain, a write of a part as likely as it is large.
struct Sample {
  std::vector<int64_t> offsets;  // bytes
  std::vector<uint64_t> values;
  int64_t element = 0;

  Sample() = default;
  explicit Sample(const ConvCall& call);
  bool holds(const at::Tensor& weight) const;
};

// A call's lists; in this order also those of PackedValue.
inline std::array<const OptionalTensor*, 3> lists_of(const ConvCall& c) {
  return {&c.in_index, &c.out_index, &c.weight_index};
}

// The per-channel vectors that a packed form takes in; in this order also those of PackedValue.
std::vector<const OptionalTensor*> vectors_of(const ConvCall& call, PackedKind kind);

// Of the values of lists and vectors; those on GPUs count by identity.
uint64_t hash_lists(const ConvCall& call, PackedKind kind);

struct PackedValue {
  // A list: nothing, the values of one on the CPU, or one on a GPU by identity.
  struct List {
    bool given = false;
    std::vector<int32_t> values;
    std::optional<TensorState> on_device;

    List() = default;
    explicit List(const OptionalTensor& list);
    bool holds(const OptionalTensor& list) const;
  };

  // A vector: nothing, one on the CPU with its values, or one on a GPU by identity.
  struct Vector {
    std::optional<TensorState> state;
    at::Tensor values;  // those of one on the CPU

    explicit Vector(const OptionalTensor& vector);
    bool holds(const OptionalTensor& vector) const;
    bool on_device() const { return state.has_value() && !values.defined(); }
  };

  TensorState weight;
  std::array<List, 3> lists;
  std::vector<Vector> vectors;
  Sample sample;
  bool has_whole = false;
  Fingerprint whole{};
  SharedTensor packed;
  int64_t bytes = 0;

  PackedValue(const ConvCall& call, PackedKind kind, PackedTrust trust);
  bool expired() const;
  // Whether the call would be packed into the same; `trust` says how its weight is compared.
  bool holds(const ConvCall& call, PackedKind kind, PackedTrust trust) const;
  // The tensors of vectors on GPUs, as addresses.
  std::vector<const void*> device_vectors() const;
  // All bytes that the value takes once `packed` is set.
  void count_bytes();
};

}  // namespace bap_kernels
