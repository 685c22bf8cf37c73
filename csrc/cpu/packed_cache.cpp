// The cache of packed weights.
#include "cpu/packed_cache.h"

#include <ATen/core/grad_mode.h>
#include <c10/util/hash.h>

#include <array>

#include "aten/packed_convolution.h"

namespace bap_kernels {
namespace {

// An inference tensor has no version counter, so a change of it could not be seen.
bool has_version(const OptionalTensor& t) { return !has_value(t) || !t->is_inference(); }

const void* identity(const OptionalTensor& t) { return has_value(t) ? t->unsafeGetTensorImpl() : nullptr; }

}  // namespace

PackedCache& PackedCache::instance() {
  static auto* cache = new PackedCache();  // never destroyed: tensors must not be freed after torch has shut down
  return *cache;
}

size_t PackedCache::KeyHash::operator()(const Key& k) const {
  return c10::get_hash(k.weight, k.in_index, k.out_index, k.weight_index, k.kind, k.variant);
}

PackedCache::Source::Source(const at::Tensor& t)
    : impl(t.getIntrusivePtr()), data(t.const_data_ptr()), version(t._version()) {}

bool PackedCache::Source::holds(const at::Tensor& t) const {
  return impl._unsafe_get_target() == t.unsafeGetTensorImpl() && data == t.const_data_ptr() &&
         version == static_cast<uint32_t>(t._version());
}

bool PackedCache::keeps(const ConvCall& c) {
  return c.cache_packed && has_version(c.weight) && has_version(c.in_index) && has_version(c.out_index) &&
         has_version(c.weight_index);
}

at::Tensor PackedCache::get(const ConvCall& c, PackedKind kind, int variant, c10::function_ref<at::Tensor()> make) {
  if (!keeps(c)) return make();
  const std::array<const OptionalTensor*, 3> lists = {&c.in_index, &c.out_index, &c.weight_index};
  const Key key{c.weight.unsafeGetTensorImpl(), identity(c.in_index),   identity(c.out_index),
                identity(c.weight_index),       static_cast<int>(kind), variant};
  const auto holds = [&](const Entry& e) {
    size_t i = 0;
    bool same = e.sources[i++].holds(c.weight);
    for (const OptionalTensor* list : lists) {
      if (has_value(*list)) same = same && e.sources[i++].holds(**list);
    }
    return same;
  };
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = index_.find(key);
    if (found != index_.end() && holds(*found->second)) {
      ++hits_;
      entries_.splice(entries_.begin(), entries_, found->second);
      return found->second->packed;
    }
    ++misses_;
    if (limit_ == 0) return make();
  }
  Entry entry{key, {}, {}, 0};
  entry.sources.emplace_back(c.weight);  // before packing: a change meanwhile makes the entry stale, not wrong
  for (const OptionalTensor* list : lists) {
    if (has_value(*list)) entry.sources.emplace_back(**list);
  }
  {
    // Kept across inference and training alike, so it must be an ordinary tensor; and one without a graph, which would
    // keep the weight alive.
    c10::InferenceMode ordinary(false);
    at::NoGradGuard no_grad;
    entry.packed = make();
  }
  entry.bytes = entry.packed.has_storage() ? static_cast<int64_t>(entry.packed.storage().nbytes())
                                           : reordered_bytes(entry.packed);
  const at::Tensor packed = entry.packed;
  std::lock_guard<std::mutex> lock(mutex_);
  const auto stale = index_.find(key);
  if (stale != index_.end()) erase(stale->second);
  if (entry.bytes > limit_) return packed;
  make_room(entry.bytes);
  bytes_ += entry.bytes;
  entries_.push_front(std::move(entry));
  index_[key] = entries_.begin();
  return packed;
}

void PackedCache::erase(Entries::iterator entry) {
  bytes_ -= entry->bytes;
  index_.erase(entry->key);
  entries_.erase(entry);
}

void PackedCache::make_room(int64_t bytes) {
  for (auto it = entries_.begin(); it != entries_.end();) {
    const auto entry = it++;
    bool dead = false;
    for (const Source& s : entry->sources) dead = dead || s.expired();
    if (dead) erase(entry);
  }
  while (!entries_.empty() && bytes_ + bytes > limit_) {
    erase(std::prev(entries_.end()));
    ++evictions_;
  }
}

PackedCache::Info PackedCache::info() {
  std::lock_guard<std::mutex> lock(mutex_);
  make_room(0);
  return {bytes_, static_cast<int64_t>(entries_.size()), limit_, hits_, misses_, evictions_};
}

void PackedCache::set_limit(int64_t bytes) {
  TORCH_CHECK_VALUE(bytes >= 0, "set_packed_cache_limit(): expected `bytes` to be at least 0, got ", bytes, ".");
  std::lock_guard<std::mutex> lock(mutex_);
  limit_ = bytes;
  make_room(0);
}

void PackedCache::clear() {
  std::lock_guard<std::mutex> lock(mutex_);
  entries_.clear();
  index_.clear();
  bytes_ = 0;
}

}  // namespace bap_kernels
