// A case that `auto` measures: its key in two forms, its candidates, and how one of them is run.
#pragma once

#include <ATen/Context.h>
#include <c10/util/FunctionRef.h>

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "dispatch/candidate.h"
#include "dispatch/measured_device.h"
#include "dispatch/verdicts.h"
#include "ops/mixed_call.h"
#include "ops/switched_call.h"

namespace bap_kernels {

// Whether PyTorch was built with oneDNN and the user has not switched it off.
inline bool onednn_enabled() { return at::Context::hasMKLDNN() && at::globalContext().userEnabledMkldnn(); }

// Everything of a call that its speed depends on, in a form that costs no allocation to build: the op, shapes, lists'
// lengths, layout, dtype, fusion, caching, and threads or the GPU. `routes`: the kernel families that tell apart what
// the shapes do not, such as alignment and runs of neighbouring channels; 0 on CPUs.
struct CaseKey {
  std::array<int32_t, 28> v{};
  bool operator==(const CaseKey& o) const { return v == o.v; }
};
CaseKey case_key(const ConvCall& call, const MeasuredDevice& device, FamilySet routes = 0);
CaseKey case_key(const BlockCalls& calls, const MeasuredDevice& device);
CaseKey case_key(const ConvBackwardCall& call, const MeasuredDevice& device, FamilySet routes = 0);
CaseKey case_key(const SwitchedCall& call, const MeasuredDevice& device, FamilySet routes = 0);
CaseKey case_key(const SwitchedBackwardCall& call, const MeasuredDevice& device, FamilySet routes = 0);
// Mixed batches are alike whose sizes, numbers of runs and longest lists have the same powers of two or quarters.
CaseKey case_key(const MixedCall& call, const MeasuredDevice& device, FamilySet routes = 0);

struct CaseKeyHash {
  size_t operator()(const CaseKey& k) const {
    uint64_t h = 0x9e3779b97f4a7c15ull;
    for (const int32_t x : k.v) h = (h ^ static_cast<uint32_t>(x)) * 0xff51afd7ed558ccdull, h ^= h >> 32;
    return h;
  }
};

// The same as text: the key in the file.
std::string case_text(const ConvCall& call, const MeasuredDevice& device, FamilySet routes = 0);
std::string case_text(const BlockCalls& calls, const MeasuredDevice& device);
std::string case_text(const ConvBackwardCall& call, const MeasuredDevice& device, FamilySet routes = 0);
std::string case_text(const SwitchedCall& call, const MeasuredDevice& device, FamilySet routes = 0);
std::string case_text(const SwitchedBackwardCall& call, const MeasuredDevice& device, FamilySet routes = 0);
std::string case_text(const MixedCall& call, const MeasuredDevice& device, FamilySet routes = 0);

// Refers to functions and tensors of the caller's. The last two functions may ask Python.
struct MeasuredCase {
  CaseKey key;
  c10::function_ref<std::string()> text;
  const at::Tensor& input;
  // Never empty; the first is preferred between equals.
  c10::function_ref<std::vector<Candidate>()> candidates;
  // Runs the call for its input or a copy of that, without keeping anything of the result.
  c10::function_ref<void(const at::Tensor& input, Candidate candidate)> run;
  // Called before the first measurement. It does what would otherwise fall into the first timed run, such as measuring
  // other cases.
  c10::function_ref<void()> prepare = nullptr;
};

}  // namespace bap_kernels
