// Devices as far as measured choices depend on them: their names, and how runs are timed there. GPUs are timed by their
// events, through PyTorch's generic interfaces, so that nothing here links with CUDA.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/FunctionRef.h>

#include <array>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "dispatch/candidate.h"
#include "dispatch/verdicts.h"

namespace bap_kernels {

struct MeasuredDevice {
  std::string name;                   // a GPU's; empty: this machine's CPU
  int32_t id = 0;                     // of the name, see device_id
  std::function<bool()> may_measure;  // whether it can be measured now; else what is known or preferred is taken
  std::function<double(Candidate candidate, c10::function_ref<void()> run)> seconds;  // of one run
  std::function<double()> now;                                                        // seconds since 1970
  bool first_run_tells = false;  // whether a first run is about as long as others: nothing is compiled for it
  int64_t number = -1;           // a GPU's, as in torch.device

  // Of a simulated GPU alone, and empty otherwise: called with each candidate that is run because it was chosen; and
  // the families of every call of the opt-in backends, in whose place ATen computes.
  std::function<void(Candidate candidate)> ran;
  std::optional<std::array<FamilySet, kBackendCount>> stand_ins;

  bool is_gpu() const { return !name.empty(); }
};

// The one that a tensor is on: a GPU, or this machine's CPU. Where the calling thread simulates a GPU, that one.
const MeasuredDevice& measured_device(const at::Tensor& input);
// Whether that is a GPU.
bool on_gpu(const at::Tensor& input);
// A GPU that stands for the device of all tensors in the calling thread, so that `auto` can be followed without one;
// nullptr: none.
void set_simulated_gpu(std::unique_ptr<const MeasuredDevice> gpu);
// What tells devices apart cheaply; 0 for an empty name.
int32_t device_id(const std::string& name);
double seconds_since_1970();

// Who knows a GPU's name, and whether its current stream is being captured; without it nothing is measured there.
void set_gpu_hooks(std::function<std::string(int64_t)> name, std::function<bool()> capturing);

}  // namespace bap_kernels
