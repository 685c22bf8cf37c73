// Backends that run where they are named and nowhere else: the CUDA C++ kernels and the Triton kernels. Each is one
// table of functions from a checked call to its kernels.
#pragma once

#include <string>
#include <vector>

#include "ops/mixed_call.h"
#include "ops/switched_call.h"

namespace bap_kernels {

// Calls must not be trivial. Each function raises NotImplementedError with the reason where no kernel covers the call.
struct NamedBackend {
  at::Tensor (*forward)(const ConvCall& call, const char* op);
  GradientTriple (*backward)(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& weight,
                             const OptionalTensor& in_index, const OptionalTensor& out_index, c10::IntArrayRef stride,
                             c10::IntArrayRef padding, c10::IntArrayRef dilation, int64_t groups,
                             std::array<bool, 3> mask);
  at::Tensor (*switched)(const SwitchedCall& call);
  SwitchedGradients (*switched_backward)(const SwitchedCall& call, const at::Tensor& grad_output, SwitchedMask mask);
  // The runs of a mixed batch `input`, in its order, as calls of their own, into `output`. Runs may read no channel,
  // and there may be none.
  void (*mixed)(const at::Tensor& output, const std::vector<MixedRun>& runs, const std::vector<ConvCall>& calls,
                const at::Tensor& input, const char* op);
};

// csrc/backends/cuda/: private ops of bap_kernels._C_cuda.
extern const NamedBackend cuda_backend;
// csrc/backends/triton/: private ops that bap_kernels/_dispatch.py implements.
extern const NamedBackend triton_backend;
// Why it does not cover a call, which it also raises, in Python; empty if it does.
std::string triton_why_not(const ConvCall& call);

// The named backends that `auto` weighs on a GPU: those that a result of tools/gpu_report.py, committed under
// benches/results/, shows right there. So far there is none.
inline const std::vector<std::string> kShownRight = {};

// The one that the calling thread named, or null.
const NamedBackend* named_backend();

}  // namespace bap_kernels
