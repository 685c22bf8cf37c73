// See list_form.h.
#include "dispatch/list_form.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/floor_divide.h>
#include <ATen/ops/full.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "dispatch/stream.h"
#include "dispatch/tensor_state.h"

namespace bap_kernels {
namespace {

// What is derived: blocks of at most `number` channels, or the inverse over `number` channels.
struct Derivation {
  enum Kind { kBlocks, kInverse } kind;
  int64_t number;
  bool operator==(const Derivation&) const = default;
};

struct Derived {
  Derivation what;
  SharedTensor tensor;
  int64_t block = 0;
};

struct KnownList {
  TensorState state;
  std::vector<Derived> derived;
};

// Never destroyed: tensors must not be freed after torch has shut down.
struct KnownLists {
  std::mutex mutex;
  std::unordered_map<const c10::TensorImpl*, KnownList> lists;
  size_t sweep_at = 64;

  // Drops those of lists that are gone, whenever their number has doubled.
  void sweep() {
    if (lists.size() < sweep_at) return;
    std::erase_if(lists, [](const auto& item) { return item.second.state.expired(); });
    sweep_at = 2 * lists.size() + 64;
  }
};
KnownLists& known_lists() {
  static auto* lists = new KnownLists();
  return *lists;
}

// For the work that the caller gives to the current stream next.
std::optional<Derived> find(const at::Tensor& index, Derivation what) {
  if (!counts_writes(index)) return std::nullopt;
  KnownLists& known = known_lists();
  std::optional<Derived> result;
  {
    std::lock_guard<std::mutex> lock(known.mutex);
    const auto list = known.lists.find(index.unsafeGetTensorImpl());
    if (list == known.lists.end() || !list->second.state.holds(index)) return std::nullopt;
    for (const Derived& derived : list->second.derived) {
      if (derived.what == what) result = derived;
    }
  }
  if (result.has_value()) pin_for_graph(index, result->tensor.use());
  return result;
}

// `state` is the list's before anything was derived: a change meanwhile makes it stale, not wrong.
void keep(const at::Tensor& index, const TensorState& state, Derived derived) {
  KnownLists& known = known_lists();
  std::lock_guard<std::mutex> lock(known.mutex);
  known.sweep();
  KnownList& list = known.lists.try_emplace(index.unsafeGetTensorImpl(), KnownList{state, {}}).first->second;
  if (!list.state.holds(index)) list = {state, {}};
  list.derived.push_back(std::move(derived));
}

}  // namespace

int64_t block_length(const int32_t* list, int64_t length, int64_t most) {
  for (const int64_t b : {32, 16, 8}) {
    bool whole = b <= most && length > 0 && length % b == 0;
    for (int64_t i = 0; whole && i < length; ++i)
      whole = list[i] == list[i / b * b] + i % b && list[i / b * b] % b == 0;
    if (whole) return b;
  }
  return 1;
}

ListForm list_form(const OptionalTensor& index, int64_t channels, bool blocks, int64_t most) {
  if (!has_value(index)) return {std::nullopt, 0, channels};
  const int64_t length = index->size(0);
  const Derivation what{Derivation::kBlocks, most};
  if (blocks) {
    if (const auto known = find(*index, what)) return {known->tensor.get(), known->block, length};
  }
  if (!blocks || !counts_writes(*index) || capturing(index->device())) return {index->contiguous(), 1, length};
  const TensorState state(*index);
  const at::Tensor values = index->cpu().contiguous();
  const int64_t b = block_length(values.const_data_ptr<int32_t>(), length, most);
  // An ordinary tensor of its own: it is kept across inference and training alike.
  const c10::InferenceMode ordinary(false);
  const at::Tensor entries = b == 1 ? index->detach().clone(at::MemoryFormat::Contiguous)
                                    : index->detach().slice(0, 0, length, b).floor_divide(b).contiguous();
  keep(*index, state, {what, SharedTensor(entries), b});
  return {entries, b, length};
}

at::Tensor inverse_list(const at::Tensor& index, int64_t channels) {
  const Derivation what{Derivation::kInverse, channels};
  if (const auto known = find(index, what)) return known->tensor.get();
  // An ordinary tensor, as above.
  const c10::InferenceMode ordinary(false);
  std::optional<TensorState> state;
  if (counts_writes(index) && !capturing(index.device())) state.emplace(index);
  const at::Tensor inverse = at::full({channels}, -1, index.options());
  inverse.index_copy_(0, index.to(at::kLong), at::arange(index.size(0), index.options()));
  if (state.has_value()) keep(index, *state, {what, SharedTensor(inverse)});
  return inverse;
}

at::Tensor all_channels(int64_t channels, c10::Device device) {
  static auto* known = new std::map<std::pair<int64_t, c10::DeviceIndex>, SharedTensor>();
  static std::mutex mutex;
  const auto make = [&] { return at::arange(channels, at::TensorOptions().dtype(at::kInt).device(device)); };
  std::unique_lock<std::mutex> lock(mutex);
  const auto list = known->find({channels, device.index()});
  if (list != known->end()) return list->second.use();
  lock.unlock();
  // A capture only records how it is made.
  if (capturing(device)) return make();
  const c10::InferenceMode ordinary(false);
  const SharedTensor shared(make());
  lock.lock();
  return known->emplace(std::pair(channels, device.index()), shared).first->second.use();
}

}  // namespace bap_kernels
