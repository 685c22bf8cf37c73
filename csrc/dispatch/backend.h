// Backends: what each offers to dispatch, and which one the calling thread has named. A backend registers itself when
// the library is loaded, so dispatch includes none of them.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "dispatch/candidate.h"
#include "dispatch/verdicts.h"
#include "ops/mixed_call.h"
#include "ops/switched_call.h"

namespace bap_kernels {

// Calls are checked, and not trivial unless a function says so. Those that are named raise NotImplementedError with the
// reason where no kernel covers a call.
struct Backend {
  const char* name;  // as use_backend() takes it
  // Whether it runs where it is named, and under `auto` only where its kernels were verified. It keeps what it derives
  // from lists by their identity.
  bool opt_in;
  // Why it cannot run in this process; empty if it can.
  std::string (*unavailable_reason)();
  // Why it cannot run a call; empty if it can, or says so when it is tried.
  std::string (*unsupported_reason)(const ConvCall& call);
  // Likewise for the backward of either convolution.
  std::string (*backward_unsupported_reason)(const at::Tensor& input, const ConvShape<int64_t>& shape);

  // Adds its candidates for a call on a device of some type, preferred first, where it covers the call. Opt-in backends
  // have one for calls of every op, and add none here.
  void (*add_candidates)(const ConvCall& call, c10::DeviceType device, std::vector<Candidate>& candidates);
  at::Tensor (*run)(const ConvCall& call, Candidate candidate, const char* op);

  // Where it is named.
  at::Tensor (*forward)(const ConvCall& call, const char* op);
  GradientTriple (*backward)(const ConvBackwardCall& call);  // may be trivial for ATen
  // Null where the switch's lists become a call of `forward`. The backward reads `call.lists` where they are given.
  at::Tensor (*switched)(const SwitchedCall& call);
  SwitchedGradients (*switched_backward)(const SwitchedBackwardCall& call);  // may be trivial, for native and ATen
  // Into `call.output`. Runs may read no channel, and there may be none. Null where each run becomes a call of
  // `forward`.
  void (*mixed)(const MixedCall& call, const char* op);

  // The kernel families that a call would run, known before it does; see verdicts.h. kUnknownFamily where no kernel
  // covers it. Null for backends that need no verdict.
  FamilySet (*forward_families)(const ConvCall& call) = nullptr;
  FamilySet (*backward_families)(const ConvBackwardCall& call) = nullptr;
  FamilySet (*switched_families)(const SwitchedCall& call) = nullptr;
  FamilySet (*switched_backward_families)(const SwitchedBackwardCall& call) = nullptr;
  FamilySet (*mixed_families)(const MixedCall& call) = nullptr;
};

struct RegisterBackend {
  RegisterBackend(BackendId id, const Backend& backend);
};
const Backend& backend(BackendId id);

// The backend that a candidate belongs to.
BackendId backend_of(Candidate candidate);
at::Tensor run_candidate(const ConvCall& call, Candidate candidate, const char* op);

// The setting of the calling thread: "auto", "heuristic", or the name of a backend. A thread begins with the default,
// BAP_KERNELS_BACKEND.
void set_backend(const std::string& name);
const std::string& get_backend();
void set_default_backend(const std::string& name);

// Whether a backend is named, so that nothing is chosen.
bool backend_is_named();
// Whether what is chosen is measured; else heuristic_backend() runs.
bool auto_measures();
// The backend of a call by rule: native kernels where they cover it on a CPU, else ATen.
const Backend& heuristic_backend(const ConvCall& call);

// The named backend for tensors on a device, ATen standing in for CPU kernels on others; null where none is named.
const Backend* named_backend(const at::Tensor& input);
// The named backend if it is opt-in, else null.
const Backend* named_opt_in_backend();

// Why a backend, by its name, cannot run in this process; empty if it can.
std::string backend_unavailable_reason(const std::string& name);
// Who knows that of backends that need Python; called when such a backend is asked for, never before.
void set_unavailable_reason(std::function<std::string(const std::string&)> reason);
std::string python_unavailable_reason(const std::string& name);

// A name for the calling thread until the scope ends, unchecked: one that another thread has set.
class BackendScope {
 public:
  explicit BackendScope(const std::string& name);
  ~BackendScope();
  BackendScope(const BackendScope&) = delete;
  BackendScope& operator=(const BackendScope&) = delete;

 private:
  std::string previous_;
};

}  // namespace bap_kernels
