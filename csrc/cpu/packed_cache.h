// Packed weights of layers in eval mode, kept per list within a byte limit, dropped when the weight changes.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/FunctionRef.h>

#include <cstdint>
#include <list>
#include <mutex>
#include <unordered_map>

#include "ops/conv_call.h"

namespace bap_kernels {

enum class PackedKind : int { kSliced, kZeroed, kReordered, kPixelRows, kChannelRows, kByFilter, kMask };

// Least recently used first out. An entry belongs to one weight and its lists by identity, and is valid only while the
// weight's version counter and storage are those it was packed from; entries of dead tensors are dropped.
class PackedCache {
 public:
  static PackedCache& instance();

  // Whether the call asks for caching and changes of its weight and lists could be seen.
  static bool keeps(const ConvCall& call);

  // The packed form of the call's weight: from the cache where the call asks for caching, else made anew.
  at::Tensor get(const ConvCall& call, PackedKind kind, int variant, c10::function_ref<at::Tensor()> make);

  struct Info {
    int64_t bytes, entries, limit_bytes, hits, misses, evictions;
  };
  Info info();
  void set_limit(int64_t bytes);
  void clear();

 private:
  struct Key {
    const void *weight, *in_index, *out_index, *weight_index;
    int kind, variant;
    bool operator==(const Key& o) const {
      return weight == o.weight && in_index == o.in_index && out_index == o.out_index &&
             weight_index == o.weight_index && kind == o.kind && variant == o.variant;
    }
  };
  struct KeyHash {
    size_t operator()(const Key& k) const;
  };
  // One tensor that an entry was made from. The weak reference keeps the address from being reused.
  struct Source {
    c10::weak_intrusive_ptr<c10::TensorImpl> impl;
    const void* data;
    uint32_t version;
    explicit Source(const at::Tensor& t);
    bool holds(const at::Tensor& t) const;
    bool expired() const { return impl.expired(); }
  };
  struct Entry {
    Key key;
    std::vector<Source> sources;
    at::Tensor packed;
    int64_t bytes;
  };
  using Entries = std::list<Entry>;  // most recently used first

  void erase(Entries::iterator entry);
  void make_room(int64_t bytes);

  std::mutex mutex_;
  Entries entries_;
  std::unordered_map<Key, Entries::iterator, KeyHash> index_;
  int64_t bytes_ = 0, limit_ = int64_t{1} << 30, hits_ = 0, misses_ = 0, evictions_ = 0;
};

}  // namespace bap_kernels
