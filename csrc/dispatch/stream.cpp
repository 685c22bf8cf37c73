// See stream.h.
#include "dispatch/stream.h"

#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <unordered_map>
#include <utility>

namespace bap_kernels {
namespace {

// Never destroyed: it holds a Python function, and Python is gone before statics are.
std::function<bool()>*& capturing_hook() {
  static std::function<bool()>* hook = nullptr;
  return hook;
}

template <class Guard>
bool stream_captures(const Guard& guard, const c10::Stream& stream) {
  if constexpr (requires { guard.isStreamCapturing(stream); }) return guard.isStreamCapturing(stream);
  return capturing_hook() != nullptr && (*capturing_hook())();
}

// For tests, which set it while nothing else runs.
struct Simulation {
  std::mutex mutex;
  std::optional<SimulatedStream> stream;
  std::vector<std::string> log;
};
Simulation& simulation() {
  static auto* simulated = new Simulation();
  return *simulated;
}

bool has_streams(c10::Device device) { return simulation().stream.has_value() || device.is_cuda(); }

void log(const char* text, int64_t stream) {
  std::lock_guard<std::mutex> lock(simulation().mutex);
  simulation().log.push_back(text + std::to_string(stream));
}

int64_t current_stream(c10::Device device) {
  if (simulation().stream.has_value()) return simulation().stream->id;
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device).id();
}

void wait_for_stream(c10::Device device) {
  if (simulation().stream.has_value()) return log("wait for ", simulation().stream->id);
  const c10::impl::VirtualGuardImpl guard(device.type());
  c10::Event event(device.type());
  event.record(guard.getStream(device));
  event.synchronize();
}

// Tells the allocator.
void record_use(const at::Tensor& t) {
  if (simulation().stream.has_value()) return log("used on ", simulation().stream->id);
  const c10::impl::VirtualGuardImpl guard(t.device().type());
  guard.recordDataPtrOnStream(t.storage().data_ptr(), guard.getStream(t.device()));
}

using WeakTensor = c10::weak_intrusive_ptr<c10::TensorImpl>;

struct Pinned {
  WeakTensor owner;  // keeps the address from being used again
  std::unordered_map<const c10::TensorImpl*, at::Tensor> tensors;
};

// Never destroyed: tensors must not be freed after torch has shut down.
struct Pins {
  std::mutex mutex;
  std::unordered_map<const c10::TensorImpl*, Pinned> of;

  // Returns what is to be freed, which the caller does after it has unlocked: freeing may run code of Python.
  std::vector<Pinned> sweep() {
    std::vector<Pinned> dropped;
    for (auto it = of.begin(); it != of.end();) {
      if (it->second.owner.expired()) {
        dropped.push_back(std::move(it->second));
        it = of.erase(it);
      } else {
        ++it;
      }
    }
    return dropped;
  }
};
Pins& pins() {
  static auto* known = new Pins();
  return *known;
}

}  // namespace

void set_capturing_hook(std::function<bool()> hook) { capturing_hook() = new std::function<bool()>(std::move(hook)); }

bool capturing(c10::Device device) {
  if (simulation().stream.has_value()) return simulation().stream->capturing;
  if (!device.is_cuda()) return false;
  const c10::impl::VirtualGuardImpl guard(device.type());
  return stream_captures(guard, guard.getStream(device));
}

SharedTensor::SharedTensor(at::Tensor tensor) : state_(std::make_shared<State>()) {
  if (tensor.defined() && has_streams(tensor.device())) {
    state_->streams.push_back(current_stream(tensor.device()));
    wait_for_stream(tensor.device());
  }
  state_->tensor = std::move(tensor);
}

const at::Tensor& SharedTensor::use() const {
  const at::Tensor& t = state_->tensor;
  if (!t.defined() || !has_streams(t.device()) || !t.has_storage() || capturing(t.device())) return t;
  const int64_t stream = current_stream(t.device());
  std::lock_guard<std::mutex> lock(state_->mutex);
  if (std::find(state_->streams.begin(), state_->streams.end(), stream) == state_->streams.end()) {
    record_use(t);
    state_->streams.push_back(stream);
  }
  return t;
}

void pin_for_graph(const at::Tensor& owner, const at::Tensor& tensor) {
  if (!tensor.defined() || !capturing(owner.device()) || owner.is_same(tensor)) return;
  std::vector<Pinned> dropped;
  std::lock_guard<std::mutex> lock(pins().mutex);
  dropped = pins().sweep();
  auto& pinned = *pins().of.emplace(owner.unsafeGetTensorImpl(), Pinned{WeakTensor(owner.getIntrusivePtr()), {}}).first;
  pinned.second.tensors.emplace(tensor.unsafeGetTensorImpl(), tensor);
}

void pin_for_graph(const at::Tensor& owner, std::initializer_list<const std::optional<at::Tensor>*> tensors) {
  if (!capturing(owner.device())) return;
  for (const auto* tensor : tensors) {
    if (tensor->has_value() && (*tensor)->defined()) pin_for_graph(owner, **tensor);
  }
}

int64_t pinned_for_graphs() {
  std::vector<Pinned> dropped;
  std::lock_guard<std::mutex> lock(pins().mutex);
  dropped = pins().sweep();
  int64_t count = 0;
  for (const auto& [owner, pinned] : pins().of) count += static_cast<int64_t>(pinned.tensors.size());
  return count;
}

void simulate_stream(std::optional<SimulatedStream> stream) { simulation().stream = stream; }

std::vector<std::string> take_stream_log() {
  std::lock_guard<std::mutex> lock(simulation().mutex);
  return std::exchange(simulation().log, {});
}

}  // namespace bap_kernels
