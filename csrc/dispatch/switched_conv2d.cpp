// The switched convolution on every device. On CPUs the switch becomes lists, and what they name is computed. On GPUs
// it is never read on the host, and `read` is unused: no channel is left out. The private ops are ATen's way of a GPU
// on CPUs too, so that machines without one can test it.
#include <ATen/ops/index_copy.h>

#include "dispatch/automatic.h"
#include "dispatch/gathered_conv2d.h"

namespace bap_kernels {
namespace {

// The full-width result of a depthwise convolution: `compact` in the channels that are on, the bias in the others.
at::Tensor widened_result(const SwitchedCall& c, const at::Tensor& compact) {
  const auto& s = c.shape;
  if (!s.depthwise || !has_value(c.lists->on)) return compact;
  at::Tensor y = at::empty({s.batch, s.channels_out, s.out_h, s.out_w}, c.input.options().memory_format(c.format()));
  if (has_value(c.bias)) {
    y.copy_(c.bias->view({1, -1, 1, 1}));
  } else {
    y.zero_();
  }
  return y.index_copy_(1, c.lists->on->to(at::kLong), compact);
}

struct AutomaticSwitched {
  using Call = SwitchedCall;
  using Result = at::Tensor;
  static constexpr auto kFamilies = &Backend::switched_families;
  static std::vector<Candidate> aten(const SwitchedCall&) { return {Candidate::kMasked}; }
  static at::Tensor run(const SwitchedCall& c, Candidate candidate, const char*) {
    return backend(backend_of(candidate)).switched(c);
  }
  static void reset(const SwitchedCall&) {}
};

struct AutomaticSwitchedBackward {
  using Call = SwitchedBackwardCall;
  using Result = SwitchedGradients;
  static constexpr auto kFamilies = &Backend::switched_backward_families;
  static std::vector<Candidate> aten(const SwitchedBackwardCall&) { return {Candidate::kMasked}; }
  static SwitchedGradients run(const SwitchedBackwardCall& c, Candidate candidate, const char*) {
    return backend(backend_of(candidate)).switched_backward(c);
  }
  static void reset(const SwitchedBackwardCall&) {}
};

at::Tensor forward(const SwitchedConv2dArgs<int64_t>& a) {
  const char* op = SwitchedConv2d::kName;
  SwitchedCall call{a, check_switched_conv2d<int64_t>(op, a)};
  SwitchLists lists;
  if (!on_gpu(a.input)) {
    lists = read_switch(op, a.switches);
    call.lists = &lists;
  }
  const Backend* named = call.trivial() ? nullptr : named_opt_in_backend();
  if (named != nullptr) return named->switched(call);
  if (call.lists == nullptr) {
    const bool measured = named_backend(a.input) == nullptr && !call.trivial();
    return measured ? run_automatically<AutomaticSwitched>(call, op) : backend(BackendId::kAten).switched(call);
  }
  const ConvCall on = call.on(lists.on);
  // Switches move from step to step, and each count of channels is a case of its own: `auto` would never stop
  // measuring.
  const Backend& native = backend(BackendId::kNative);
  const bool unmeasured = named_backend(a.input) == nullptr && !on.trivial() && native.unsupported_reason(on).empty();
  return widened_result(call, unmeasured ? native.forward(on, op) : run_gathered_conv2d(on, op));
}

SwitchedGradients backward(const SwitchedConv2dBackwardArgs<int64_t>& a) {
  const char* op = SwitchedConv2dBackward::kName;
  SwitchedBackwardCall call{a, check_switched_conv2d_backward<int64_t>(op, a)};
  const bool trivial = call.shape.trivial();
  SwitchLists lists;
  if (!on_gpu(a.input)) {
    lists = read_switch(op, a.switches);
    call.lists = &lists;
  }
  const Backend* named = named_backend(a.input);
  if (named != nullptr && named->opt_in && trivial) named = nullptr;
  if (named == nullptr && !trivial && call.lists == nullptr) {
    return run_automatically<AutomaticSwitchedBackward>(call, op);
  }
  // As in the forward, a call that is answered without a convolution is no backend's.
  const bool answered = trivial || (call.lists != nullptr && lists.off.size(0) == call.shape.channels_in);
  const bool fallback = named == nullptr || (named == &backend(BackendId::kNative) && answered);
  return (fallback ? backward_backend(a.input, call.shape) : *named).switched_backward(call);
}

at::Tensor masked_forward(const SwitchedConv2dArgs<int64_t>& a) {
  return backend(BackendId::kAten).switched({a, check_switched_conv2d<int64_t>(SwitchedConv2d::kName, a)});
}

SwitchedGradients masked_backward(const SwitchedConv2dBackwardArgs<int64_t>& a) {
  const auto shape = check_switched_conv2d_backward<int64_t>(SwitchedConv2dBackward::kName, a);
  return backend(BackendId::kAten).switched_backward({a, shape});
}

void implement_ops(torch::Library& m) {
  implement<SwitchedConv2d, forward>(m);
  implement<SwitchedConv2dBackward, backward>(m);
  implement<SwitchedConv2dMasked, masked_forward>(m);
  implement<SwitchedConv2dMaskedBackward, masked_backward>(m);
}

}  // namespace

TORCH_LIBRARY_IMPL(bap_kernels, CPU, m) { implement_ops(m); }
TORCH_LIBRARY_IMPL(bap_kernels, CUDA, m) { implement_ops(m); }

}  // namespace bap_kernels
