// Packed weights of layers in eval mode, kept per list within a byte limit, and used only while the weight holds what
// they were packed from.
//
// A weight can change without a trace: its version counter counts what autograd sees, and neither fused optimisers nor
// collectives, NumPy, other processes or writes through `.data` are seen. So an entry belongs to the weight's tensor
// and storage (weak references, which keep addresses from being reused), its address and its version, and besides the
// values are compared at every call:
//   kSample  some of the listed values, spread over all of them, where torch alone owns the memory
//   kWhole   all rows that are listed, by a fingerprint, where something else may write to it
// Lists are compared by value, and so are the per-channel vectors that some forms take in. On GPUs values cannot be
// compared without a stall: what would need it is not kept there.
//
// While a graph is captured nothing is kept, and what is found is pinned to the weight; see stream.h.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/FunctionRef.h>

#include <atomic>
#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "ops/conv_call.h"

namespace bap_kernels {

enum class PackedKind : int {
  kSliced,
  kZeroed,
  kReordered,
  kConvNhwc,
  kConvNchw,
  kByFilter,
  kWeightTiles,
  kMask,
  // With the call's scales in them, and its bias with scale and shift.
  kSlicedFolded,
  kZeroedFolded,
  kReorderedFolded,
  kBiasFolded,
  kWinograd4,
  kWinograd2,
  kDepthwise,
};

// How packed weights of a call are kept.
enum class PackedTrust : int { kNone, kWhole, kSample };

struct PackedValue;  // what is kept, and what it was made from

// Least recently used first out.
class PackedCache {
  struct Key {
    const void* weight;
    uint64_t lists;  // hash of the values of lists and vectors, those of GPUs by identity; 0: of the last ones
    int kind, variant;
    bool operator==(const Key& o) const = default;
  };

 public:
  static PackedCache& instance();

  static PackedTrust trust(const ConvCall& call);

  // Whether the call asks for caching and changes of its weight and lists could be seen.
  static bool keeps(const ConvCall& call) { return trust(call) != PackedTrust::kNone; }

  // Whether besides changes of the vectors that a form takes in could be seen.
  static bool keeps(const ConvCall& call, PackedKind kind);

  // Why a call that asks for caching compares its weight whole, or packs it every time; empty where it does neither.
  static std::string note(const ConvCall& call);

  // The packed form of the call's weight: from the cache where the call asks for caching, else made anew.
  at::Tensor get(const ConvCall& call, PackedKind kind, int variant, c10::function_ref<at::Tensor()> make);

  struct Info {
    int64_t bytes, entries, limit_bytes, hits, misses, evictions, compared, not_kept, pinned;
  };
  Info info();
  void set_limit(int64_t bytes);
  void clear();

  // What is kept of a weight: a number that nothing else ever has, its bytes with all that belongs to it, and whether
  // it was packed for these lists.
  struct Kept {
    uint64_t number;
    int64_t bytes;
    bool of_lists;
  };
  std::vector<Kept> kept_of(const at::Tensor& weight, const OptionalTensor& in_index, const OptionalTensor& out_index,
                            const OptionalTensor& weight_index);

  // Drops all that is kept of a weight, and what took in this vector on a GPU; next to nothing to do where nothing is
  // kept at all.
  void drop(const at::Tensor& tensor);

  // While it lives, calls of its thread are tracked by autograd with respect to the weight: training may follow, and
  // write without a trace. So they compare the whole weight, as does the next use of each kept form of it.
  class Tracked {
   public:
    explicit Tracked(const at::Tensor& weight);
    ~Tracked();
    Tracked(const Tracked&) = delete;
    Tracked& operator=(const Tracked&) = delete;

   private:
    const at::Tensor& weight_;
    bool before_;
  };

  // What its thread packs while it lives is dropped with it: the weights of candidates that are only tried.
  class Trial {
   public:
    Trial();
    ~Trial();
    Trial(const Trial&) = delete;
    Trial& operator=(const Trial&) = delete;

   private:
    friend class PackedCache;
    std::vector<std::pair<Key, uint64_t>> kept_;  // with the number of the entry
    Trial* outer_;
  };

 private:
  struct KeyHash {
    size_t operator()(const Key& k) const;
  };
  struct Group;
  struct Entry {
    Key key;
    uint64_t number;
    Group* group;
    uint64_t doubts;  // of the group, when the entry was last compared whole
    std::shared_ptr<const PackedValue> value;
  };
  using Entries = std::list<Entry>;  // most recently used first
  // All that is kept of one weight.
  struct Group {
    uint64_t doubts = 0;
    std::unordered_set<const Entry*> entries;
  };

  void erase(Entries::iterator entry);
  void sweep();
  void evict(int64_t limit);

  std::mutex mutex_;
  Entries entries_;
  std::unordered_map<Key, Entries::iterator, KeyHash> index_;
  std::unordered_map<const void*, Group> groups_;
  std::unordered_map<const void*, std::unordered_set<const Entry*>> vector_entries_;  // by vectors on GPUs
  size_t made_since_sweep_ = 0;
  uint64_t next_number_ = 0;
  int64_t bytes_ = 0, limit_ = int64_t{1} << 30, evictions_ = 0;
  std::atomic<int64_t> count_ = 0, hits_ = 0, misses_ = 0, compared_ = 0, not_kept_ = 0;
};

}  // namespace bap_kernels
