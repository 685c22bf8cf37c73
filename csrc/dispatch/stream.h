// Streams as far as cached tensors depend on them: whether a stream is captured, when a tensor is complete, and who
// still reads it. Through PyTorch's generic interfaces, so that nothing here links with CUDA.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

namespace bap_kernels {

// Whether work for the device's current stream is recorded into a graph, not done. False on CPUs.
bool capturing(c10::Device device);

// A tensor that is made once and read by many calls, on any stream of its device. Copies share their state.
class SharedTensor {
 public:
  SharedTensor() = default;
  // Waits for the stream that makes it. So a later reader needs no event, and a capture can read it: a captured stream
  // may not wait for work outside of the graph. Precondition: that stream is not captured.
  explicit SharedTensor(at::Tensor tensor);

  // For the work that the caller gives to the current stream next: the memory is not used again before that is done,
  // even if the tensor is dropped meanwhile. Captured work needs pin_for_graph() instead.
  const at::Tensor& use() const;
  bool defined() const { return state_ != nullptr && state_->tensor.defined(); }
  // Without that: for what is read on the host alone.
  const at::Tensor& get() const { return state_->tensor; }

 private:
  struct State {
    at::Tensor tensor;
    std::mutex mutex;
    std::vector<int64_t> streams;  // by id: where it was made, and where it was used
  };
  std::shared_ptr<State> state_;
};

// While a graph is captured, keeps what its kernels read for as long as `owner` lives. The graph holds addresses alone:
// what a cache dropped, for room or because a weight changed, would be memory of somebody else. Does nothing where
// nothing is captured. What is made during the capture lies in the graph's own memory and needs no pin.
void pin_for_graph(const at::Tensor& owner, const at::Tensor& tensor);
void pin_for_graph(const at::Tensor& owner, std::initializer_list<const std::optional<at::Tensor>*> tensors);
// Number of tensors that are pinned; drops those whose owners are gone.
int64_t pinned_for_graphs();

// Stands for streams of every device, CPUs too, so that tests need no GPU. `log` receives "wait for S" and "used on S".
struct SimulatedStream {
  int64_t id = 0;
  bool capturing = false;
};
void simulate_stream(std::optional<SimulatedStream> stream);
std::vector<std::string> take_stream_log();

// Who knows whether the current stream of a GPU is captured, for versions of PyTorch that have no generic question.
void set_capturing_hook(std::function<bool()> hook);

}  // namespace bap_kernels
