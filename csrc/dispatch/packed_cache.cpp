// The cache of packed weights.
#include "dispatch/packed_cache.h"

#include <ATen/core/grad_mode.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/hash.h>

#include <algorithm>

#include "dispatch/packed_memory.h"
#include "dispatch/packed_value.h"
#include "dispatch/stream.h"

namespace bap_kernels {
namespace {

thread_local bool tracked = false;
thread_local PackedCache::Trial* trial = nullptr;

// Dead entries are looked for once this many were made, and as many as half of those there are.
constexpr size_t kFewestToSweep = 16;

// Why values could be written without a trace in the tensor's version; null if they could not, as far as can be seen.
const char* untraced(const at::Tensor& w) {
  if (!counts_writes(w)) return "it was made in inference mode, which counts no changes";
  const c10::Storage& storage = w.storage();
  if (w.is_cpu()) {
    static const auto own = c10::GetCPUAllocator()->raw_deleter();
    if (storage.data_ptr().get_deleter() != own) {
      return "its memory is shared with another process, a file, NumPy or another library";
    }
    // Tensor.numpy() forbids to resize the storage, for good. What was read from a file has no allocator, and was never
    // to be resized.
    if (!storage.resizable() && storage.allocator() != nullptr) return "NumPy has a view of its memory";
  } else if (storage.unsafeGetStorageImpl()->received_cuda()) {
    return "its memory is another process's";
  }
  // Python's object of a storage is an owner, and once it was asked for it stays as long as the storage.
  const size_t objects = storage.unsafeGetStorageImpl()->pyobj_slot()->load_pyobj() != nullptr ? 1 : 0;
  if (storage.use_count() > 1 + objects) {
    return "another tensor has the same memory: a state_dict or a view that is kept, `.data`, or a flat vector";
  }
  return nullptr;
}

// The same for all lists of a weight where only the last one's form is kept.
uint64_t lists_key(const ConvCall& c, PackedKind kind) {
  const auto lists = lists_of(c);
  const bool any = std::any_of(lists.begin(), lists.end(), [](const auto* list) { return has_value(*list); });
  return any && packed_memory() == PackedMemory::kShared ? 0 : hash_lists(c, kind);
}

bool has_version(const OptionalTensor& list) { return !has_value(list) || list->is_cpu() || counts_writes(*list); }

}  // namespace

PackedCache& PackedCache::instance() {
  static auto* cache = new PackedCache();  // never destroyed: tensors must not be freed after torch has shut down
  return *cache;
}

bool PackedCache::keeps(const ConvCall& c, PackedKind kind) {
  const auto vectors = vectors_of(c, kind);
  const bool seen = std::all_of(vectors.begin(), vectors.end(), [](const OptionalTensor* vector) {
    return !has_value(*vector) || (*vector)->is_cpu() || untraced(**vector) == nullptr;
  });
  return seen && keeps(c);
}

PackedTrust PackedCache::trust(const ConvCall& c) {
  if (!c.cache_packed || !c.weight.has_storage()) return PackedTrust::kNone;
  if (!tracked && untraced(c.weight) == nullptr) {
    const auto lists = lists_of(c);
    const bool seen = std::all_of(lists.begin(), lists.end(), [](const auto* list) { return has_version(*list); });
    return seen ? PackedTrust::kSample : PackedTrust::kNone;
  }
  return c.weight.is_cpu() && has_dense_rows(c.weight) ? PackedTrust::kWhole : PackedTrust::kNone;
}

std::string PackedCache::note(const ConvCall& c) {
  if (!c.cache_packed) return "";
  const PackedTrust how = trust(c);
  if (how == PackedTrust::kSample) return "";
  const char* reason = untraced(c.weight);
  const std::string why = tracked || reason == nullptr ? "its changes could not be seen" : reason;
  return std::string(how == PackedTrust::kWhole ? "weight compared" : "weight packed") + " at every call: " + why;
}

size_t PackedCache::KeyHash::operator()(const Key& k) const {
  return c10::get_hash(k.weight, k.lists, k.kind, k.variant);
}

at::Tensor PackedCache::get(const ConvCall& c, PackedKind kind, int variant, c10::function_ref<at::Tensor()> make) {
  const PackedTrust trusted = keeps(c, kind) ? trust(c) : PackedTrust::kNone;
  if (trusted == PackedTrust::kNone) {
    if (c.cache_packed) ++not_kept_;
    return make();
  }
  const Key key{c.weight.unsafeGetTensorImpl(), lists_key(c, kind), static_cast<int>(kind), variant};
  uint64_t doubts = 0, number = 0;
  bool doubted = false;
  std::shared_ptr<const PackedValue> known;
  bool off = false;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto hit = index_.find(key);
    if (hit != index_.end()) {
      const Entry& entry = *hit->second;
      known = entry.value;
      number = entry.number;
      doubts = entry.group->doubts;
      doubted = entry.doubts != doubts;
      entries_.splice(entries_.begin(), entries_, hit->second);
    } else {
      const auto group = groups_.find(key.weight);
      if (group != groups_.end()) doubts = group->second.doubts;
    }
    off = limit_ == 0;
  }
  if (off) return make();
  // Outside the lock: it may read the whole weight.
  const PackedTrust how = doubted ? PackedTrust::kWhole : trusted;
  if (how == PackedTrust::kWhole) ++compared_;
  if (known != nullptr && known->holds(c, kind, how)) {
    ++hits_;
    if (doubted) {
      std::lock_guard<std::mutex> lock(mutex_);
      const auto hit = index_.find(key);
      if (hit != index_.end() && hit->second->number == number) hit->second->doubts = doubts;
    }
    pin_for_graph(c.weight, known->packed.get());
    return known->packed.use();
  }
  // What a capture has recorded holds nothing before the graph is replayed.
  if (capturing(c.weight.device())) return make();
  ++misses_;
  // What it is made from is noted before packing: a change meanwhile makes the entry stale, not wrong.
  const auto value = std::make_shared<PackedValue>(c, kind, trusted);
  {
    // Kept across inference and training alike, so it must be an ordinary tensor; and one without a graph, which would
    // keep the weight alive.
    c10::InferenceMode ordinary(false);
    at::NoGradGuard no_grad;
    value->packed = SharedTensor(make());
  }
  value->count_bytes();
  std::lock_guard<std::mutex> lock(mutex_);
  const auto stale = index_.find(key);
  if (stale != index_.end()) erase(stale->second);
  if (value->bytes > limit_) return value->packed.get();
  if (++made_since_sweep_ > kFewestToSweep + entries_.size() / 2) sweep();
  evict(limit_ - value->bytes);
  bytes_ += value->bytes;
  Group& group = groups_[key.weight];
  entries_.push_front({key, next_number_++, &group, doubts, value});
  group.entries.insert(&entries_.front());
  for (const void* vector : value->device_vectors()) vector_entries_[vector].insert(&entries_.front());
  index_[key] = entries_.begin();
  ++count_;
  if (trial != nullptr) trial->kept_.emplace_back(key, entries_.front().number);
  return value->packed.get();
}

void PackedCache::erase(Entries::iterator entry) {
  bytes_ -= entry->value->bytes;
  --count_;
  entry->group->entries.erase(&*entry);
  if (entry->group->entries.empty()) groups_.erase(entry->key.weight);
  for (const void* vector : entry->value->device_vectors()) {
    const auto found = vector_entries_.find(vector);
    found->second.erase(&*entry);
    if (found->second.empty()) vector_entries_.erase(found);
  }
  index_.erase(entry->key);
  entries_.erase(entry);
}

void PackedCache::sweep() {
  made_since_sweep_ = 0;
  for (auto it = entries_.begin(); it != entries_.end();) {
    const auto entry = it++;
    if (entry->value->expired()) erase(entry);
  }
}

void PackedCache::evict(int64_t limit) {
  while (!entries_.empty() && bytes_ > limit) {
    erase(std::prev(entries_.end()));
    ++evictions_;
  }
}

PackedCache::Info PackedCache::info() {
  const int64_t pinned = pinned_for_graphs();
  std::lock_guard<std::mutex> lock(mutex_);
  sweep();
  return {bytes_, static_cast<int64_t>(entries_.size()), limit_, hits_, misses_, evictions_, compared_, not_kept_,
          pinned};
}

void PackedCache::set_limit(int64_t bytes) {
  TORCH_CHECK_VALUE(bytes >= 0, "set_packed_cache_limit(): expected `bytes` to be at least 0, got ", bytes, ".");
  std::lock_guard<std::mutex> lock(mutex_);
  limit_ = bytes;
  sweep();
  evict(limit_);
}

void PackedCache::clear() {
  std::lock_guard<std::mutex> lock(mutex_);
  index_.clear();
  groups_.clear();
  vector_entries_.clear();
  entries_.clear();
  bytes_ = 0;
  count_ = 0;
}

std::vector<PackedCache::Kept> PackedCache::kept_of(const at::Tensor& weight, const OptionalTensor& in_index,
                                                    const OptionalTensor& out_index,
                                                    const OptionalTensor& weight_index) {
  const std::array<const OptionalTensor*, 3> lists = {&in_index, &out_index, &weight_index};
  std::vector<Kept> kept;
  std::lock_guard<std::mutex> lock(mutex_);
  sweep();
  const auto group = groups_.find(weight.unsafeGetTensorImpl());
  if (group == groups_.end()) return kept;
  for (const Entry* entry : group->second.entries) {
    bool same = true;
    for (size_t i = 0; i < lists.size(); ++i) same = same && entry->value->lists[i].holds(*lists[i]);
    kept.push_back({entry->number, entry->value->bytes, same});
  }
  return kept;
}

void PackedCache::drop(const at::Tensor& tensor) {
  if (count_ == 0) return;
  std::lock_guard<std::mutex> lock(mutex_);
  std::vector<Key> keys;
  const auto group = groups_.find(tensor.unsafeGetTensorImpl());
  if (group != groups_.end()) {
    for (const Entry* entry : group->second.entries) keys.push_back(entry->key);
  }
  const auto of_vector = vector_entries_.find(tensor.unsafeGetTensorImpl());
  if (of_vector != vector_entries_.end()) {
    for (const Entry* entry : of_vector->second) keys.push_back(entry->key);
  }
  for (const Key& key : keys) erase(index_.at(key));
}

PackedCache::Tracked::Tracked(const at::Tensor& weight) : weight_(weight), before_(tracked) { tracked = true; }

PackedCache::Tracked::~Tracked() {
  tracked = before_;
  PackedCache& cache = instance();
  if (cache.count_ == 0) return;
  if (!weight_.is_cpu()) {
    cache.drop(weight_);
    return;
  }
  std::lock_guard<std::mutex> lock(cache.mutex_);
  const auto group = cache.groups_.find(weight_.unsafeGetTensorImpl());
  if (group != cache.groups_.end()) ++group->second.doubts;
}

PackedCache::Trial::Trial() : outer_(trial) { trial = this; }

PackedCache::Trial::~Trial() {
  trial = outer_;
  PackedCache& cache = instance();
  std::lock_guard<std::mutex> lock(cache.mutex_);
  for (const auto& [key, number] : kept_) {
    const auto kept = cache.index_.find(key);
    if (kept != cache.index_.end() && kept->second->number == number) cache.erase(kept->second);
  }
}

}  // namespace bap_kernels
