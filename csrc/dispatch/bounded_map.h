// A map that forgets what was not used for longest, roughly, and costs a hash look-up.
#pragma once

#include <algorithm>
#include <cstddef>
#include <unordered_map>
#include <utility>

namespace bap_kernels {

// Two generations: what is used moves into the young one, and when that holds half of the limit it becomes the old one
// and the one before is dropped. So the last limit / 2 entries that were used are there, and never more than limit.
// References stay valid until the next call of get or put.
template <typename Key, typename Value, typename Hash = std::hash<Key>>
class BoundedMap {
 public:
  explicit BoundedMap(size_t limit) { set_limit(limit); }

  void set_limit(size_t limit) {
    half_ = std::max<size_t>(1, limit / 2);
    clear();
  }

  Value* get(const Key& key) {
    const auto young = young_.find(key);
    if (young != young_.end()) return &young->second;
    const auto old = old_.find(key);
    if (old == old_.end()) return nullptr;
    Value value = std::move(old->second);
    old_.erase(old);
    return put(key, std::move(value));
  }

  Value* put(const Key& key, Value value) {
    old_.erase(key);
    if (young_.size() >= half_ && young_.find(key) == young_.end()) {
      old_ = std::move(young_);
      young_.clear();
    }
    return &young_.insert_or_assign(key, std::move(value)).first->second;
  }

  void erase(const Key& key) {
    young_.erase(key);
    old_.erase(key);
  }

  void clear() {
    young_.clear();
    old_.clear();
  }

  template <typename Function>
  void for_each(Function function) const {
    for (const auto* map : {&young_, &old_}) {
      for (const auto& item : *map) function(item.second);
    }
  }

 private:
  size_t half_ = 1;
  std::unordered_map<Key, Value, Hash> young_, old_;
};

}  // namespace bap_kernels
