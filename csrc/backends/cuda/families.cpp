// See families.h.
#include "backends/cuda/families.h"

#include "backends/cuda/routes.h"

namespace bap_kernels {
namespace {

FamilySet of(std::initializer_list<CudaKernel> kernels, FamilyMath math) {
  using enum CudaKernel;
  FamilySet all = 0;
  for (const CudaKernel kernel : kernels) {
    const bool words = math == FamilyMath::kFloat16 || math == FamilyMath::kBFloat16;
    if (words || (kernel != kWgmma && kernel != kWgmmaWeightGradient)) all |= family(kernel, math);
  }
  return all;
}

template <class Call>
bool covered(const Call& c, int64_t groups) {
  return uncovered_reason(c.input, c.weight, groups, c.shape.out_h, c.shape.out_w).empty();
}

// The list of a switch: all channels, one by one. Its entries are not read here.
ListForm switch_order(const SwitchedCall& c) { return {std::nullopt, 1, c.shape.channels_in}; }

}  // namespace

FamilySet cuda_families() {
  using enum CudaKernel;
  if (cuda_launcher() == nullptr) return 0;
  FamilySet all = 0;
  for (const FamilyMath math : {FamilyMath::kTf32, FamilyMath::kFloat16, FamilyMath::kBFloat16}) {
    all |= of({kNhwc, kWgmma, kPlanar, kHalo, kSplit, kPack, kInputGradient, kWeightGradient, kWgmmaWeightGradient,
               kSwitched, kMixed},
              math);
  }
  return all;
}

FamilySet cuda_forward_families(const ConvCall& c) {
  return covered(c, c.groups) ? plan_forward(c).plan.families : kUnknownFamily;
}

FamilySet cuda_backward_families(const ConvBackwardCall& c) {
  if (!covered(c, c.groups)) return kUnknownFamily;
  FamilySet all = 0;
  if (c.mask[0]) all |= plan_input_gradient(c, layout_of_like(c.input)).plan.families;
  if (c.mask[1]) {
    all |= plan_weight_gradient(c.grad_output, c.input, c.shape.kept_out, list_form(c.in_index, c.shape.channels_in))
               .families;
  }
  return all;
}

FamilySet cuda_switched_families(const SwitchedCall& c) {
  if (!covered(c, c.groups)) return kUnknownFamily;
  return plan_switched(c, switch_order(c)).plan.families | family(CudaKernel::kSwitched, math_of(c.input));
}

FamilySet cuda_switched_backward_families(const SwitchedBackwardCall& c) {
  if (!covered(c, c.groups)) return kUnknownFamily;
  const FamilyMath math = math_of(c.input);
  const ListForm order = switch_order(c.forward());
  FamilySet all = family(CudaKernel::kSwitched, math);
  const bool input = c.mask[kGradInput] || c.mask[kGradSwitch];
  if (input) all |= plan_switched_gradient(c, order).plan.families;
  if (c.mask[kGradWeight]) all |= plan_weight_gradient(c.grad_output, c.input, c.shape.channels_out, order).families;
  if ((input || c.mask[kGradWeight]) && !aligned_chunks(c.grad_output, false)) all |= family(CudaKernel::kPack, math);
  return all;
}

FamilySet cuda_mixed_families(const MixedCall& c) {
  if (!covered(c, /*groups=*/1)) return kUnknownFamily;
  return plan_mixed(c).plan.families | family(CudaKernel::kMixed, math_of(c.input));
}

}  // namespace bap_kernels
