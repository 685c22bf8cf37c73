// The native kernels as a backend, for CPUs.
#include "dispatch/backend.h"

#include <c10/util/Exception.h>

#include "backends/cpu/isa.h"
#include "backends/cpu/native.h"
#include "backends/cpu/winograd.h"

namespace bap_kernels {
namespace {

void check_supported(const std::string& reason, const char* op) {
  TORCH_CHECK_NOT_IMPLEMENTED(reason.empty(), op,
                              "(): expected a call that backend `native` can "
                              "run, got one that it cannot: ",
                              reason,
                              ". Hint: use_backend(\"auto\") takes the ATen "
                              "path where native cannot run.");
}

void add_candidates(const ConvCall& call, c10::DeviceType device, std::vector<Candidate>& candidates) {
  if (device != c10::kCPU || !native_unsupported_reason(call).empty()) return;
  candidates.push_back(Candidate::kNative);
  for (const int64_t size : winograd_promises(call)) {
    candidates.push_back(size == kWinogradLarge ? Candidate::kWinograd4 : Candidate::kWinograd2);
  }
}

at::Tensor run(const ConvCall& call, Candidate candidate, const char*) {
  if (candidate == Candidate::kNative) return native_gathered_conv2d(call);
  return winograd_gathered_conv2d(call, candidate == Candidate::kWinograd4 ? kWinogradLarge : kWinogradSmall);
}

at::Tensor forward(const ConvCall& call, const char* op) {
  check_supported(native_unsupported_reason(call), op);
  return native_unmeasured_gathered_conv2d(call);
}

GradientTriple backward(const ConvBackwardCall& call) {
  check_supported(native_backward_unsupported_reason(call.input, call.shape), GatheredConv2dBackward::kName);
  return native_gathered_conv2d_backward(call);
}

SwitchedGradients switched_backward(const SwitchedBackwardCall& call) {
  check_supported(native_backward_unsupported_reason(call.input, call.shape), SwitchedConv2dBackward::kName);
  return native_switched_conv2d_backward(call);
}

const Backend kNative{
    .name = "native",
    .opt_in = false,
    .unavailable_reason = [] { return std::string(isa() == "none" ? kNoInstructions : ""); },
    .unsupported_reason = native_unsupported_reason,
    .backward_unsupported_reason = native_backward_unsupported_reason,
    .add_candidates = add_candidates,
    .run = run,
    .forward = forward,
    .backward = backward,
    .switched = nullptr,
    .switched_backward = switched_backward,
    .mixed = native_gathered_conv2d_mixed,
};
const RegisterBackend registered(BackendId::kNative, kNative);

}  // namespace
}  // namespace bap_kernels
