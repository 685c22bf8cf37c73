// How `auto` runs a call on a GPU, one way for all ops: PyTorch's ways and the opt-in backends whose kernels for the
// call were all verified there are measured against each other, and no error of an opt-in backend reaches the user.
#pragma once

#include <exception>

#include "dispatch/backend.h"
#include "dispatch/choice.h"
#include "dispatch/python_hooks.h"

namespace bap_kernels {

// An op gives:
//   Call, Result
//   kFamilies                     the member of Backend that names a call's families
//   aten(call)                    ATen's candidates, preferred first
//   run(call, candidate, name)    computes; nothing of the user's is written before it returns
//   reset(call)                   forgets what a run that raised an error has left

// Whether a backend has a verified kernel in the math mode of a tensor, on a device.
bool has_verified_kernels(BackendId id, const at::Tensor& input, const MeasuredDevice& device);

// Whether all kernels of a backend are verified in that mode, so that the families of a call need not be asked.
bool is_fully_verified(BackendId id, const at::Tensor& input, const MeasuredDevice& device);

// The families that `ask` names; kUnknownFamily where it raises an error other than an interrupt.
FamilySet families_or_unknown(c10::function_ref<FamilySet()> ask);

// Why `auto` leaves an opt-in backend out of a call; empty if it does not.
std::string auto_excluded_reason(BackendId id, const ConvCall& call, const MeasuredDevice& device);

// The key of a call's choice in the file.
std::string automatic_case_text(const ConvCall& call, const MeasuredDevice& device);

// Of a simulated GPU: see MeasuredDevice.
inline FamilySet stand_in(BackendId id, const MeasuredDevice& device) {
  return (*device.stand_ins)[static_cast<int>(id)];
}

// The families of a call by a backend, asked where it has a verified kernel; else kUnknownFamily.
template <class Call>
FamilySet automatic_families(BackendId id, FamilySet (*Backend::*families)(const Call&), const Call& call,
                             const MeasuredDevice& device) {
  if (!has_verified_kernels(id, call.input, device)) return kUnknownFamily;
  if (device.stand_ins) return stand_in(id, device);
  return families_or_unknown([&] { return (backend(id).*families)(call); });
}

template <class Op>
typename Op::Result run_automatically(const typename Op::Call& call, const char* name) {
  using Call = typename Op::Call;
  if (!auto_measures()) return Op::run(call, Op::aten(call).front(), name);
  const MeasuredDevice& device = measured_device(call.input);
  Verdicts& verdicts = Verdicts::instance();
  verdicts.ask(device.number, device.may_measure);
  const auto families = [&](BackendId id) { return automatic_families(id, Op::kFamilies, call, device); };
  const auto verified = [&](FamilySet needed) { return (needed & ~verdicts.ok(device.number)) == 0; };
  const auto run = [&](const Call& c, Candidate candidate) {
    const bool stands_in = device.stand_ins && backend(backend_of(candidate)).opt_in;
    return Op::run(c, stands_in ? Op::aten(c).front() : candidate, name);
  };

  // CUDA's are asked at every call, for they also tell cases apart; Triton's cost a call of Python.
  const FamilySet routes = families(BackendId::kCuda);
  const auto text = [&] { return case_text(call, device, routes); };
  const auto candidates = [&] {
    std::vector<Candidate> list = Op::aten(call);
    if (verified(routes)) list.push_back(Candidate::kCuda);
    if (verified(families(BackendId::kTriton))) list.push_back(Candidate::kTriton);
    return list;
  };
  const auto measured_run = [&](const at::Tensor& input, Candidate candidate) {
    run(call.with_input(input), candidate);
  };
  const MeasuredCase c{case_key(call, device, routes), text, call.input, candidates, measured_run};
  ChoiceTable& table = ChoiceTable::instance();
  CandidateSet failed = 0, raised = 0;
  for (Candidate chosen = table.choose(c, device);; chosen = table.next_best(c, failed)) {
    const BackendId id = backend_of(chosen);
    if (!backend(id).opt_in) {
      if (device.ran) device.ran(chosen);
      auto result = run(call, chosen);
      if (raised != 0) table.decline(c, raised);
      return result;
    }
    // The case was measured with other strides, lists or verdicts perhaps.
    const bool may_run =
        id == BackendId::kCuda ? verified(routes) : is_fully_verified(id, call.input, device) || verified(families(id));
    if (may_run) {
      try {
        if (device.ran) device.ran(chosen);
        auto result = run(call, chosen);
        if (raised != 0) table.decline(c, raised);
        return result;
      } catch (...) {
        if (is_interrupt(std::current_exception())) throw;
        Op::reset(call);
        raised |= set_of(chosen);
      }
    }
    failed |= set_of(chosen);
  }
}

}  // namespace bap_kernels
