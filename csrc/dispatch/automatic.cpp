// See automatic.h.
#include "dispatch/automatic.h"

namespace bap_kernels {
namespace {

// All families of a backend that calls on such a tensor may need; of float32 in Triton's interpreter those of IEEE,
// too, whatever the setting for TF32 says.
FamilySet families_of_math(BackendId id, const at::Tensor& input) {
  const FamilyMath math = math_of(input);
  if (id == BackendId::kCuda) return cuda_families_of(math);
  const FamilySet own = triton_families_of(math);
  return math == FamilyMath::kTf32 && input.is_cpu() ? own | triton_families_of(FamilyMath::kFloat32) : own;
}

}  // namespace

bool has_verified_kernels(BackendId id, const at::Tensor& input, const MeasuredDevice& device) {
  return (families_of_math(id, input) & Verdicts::instance().ok(device.number)) != 0;
}

bool is_fully_verified(BackendId id, const at::Tensor& input, const MeasuredDevice& device) {
  return !device.stand_ins && (families_of_math(id, input) & ~Verdicts::instance().ok(device.number)) == 0;
}

FamilySet families_or_unknown(c10::function_ref<FamilySet()> ask) {
  try {
    return ask();
  } catch (...) {
    if (is_interrupt(std::current_exception())) throw;
    return kUnknownFamily;
  }
}

std::string automatic_case_text(const ConvCall& call, const MeasuredDevice& device) {
  if (!device.is_gpu()) return case_text(call, device);
  return case_text(call, device, automatic_families(BackendId::kCuda, &Backend::forward_families, call, device));
}

std::string auto_excluded_reason(BackendId id, const ConvCall& call, const MeasuredDevice& device) {
  const Backend& own = backend(id);
  std::string reason = device.stand_ins ? "" : own.unavailable_reason();
  if (reason.empty() && !device.stand_ins) reason = own.unsupported_reason(call);
  if (!reason.empty()) return reason;
  const FamilySet families =
      device.stand_ins ? stand_in(id, device) : families_or_unknown([&] { return own.forward_families(call); });
  return Verdicts::instance().problem(device.number, families);
}

}  // namespace bap_kernels
