// See families.h. So far every kernel that a call might run.
#include "backends/cuda/families.h"

#include "backends/cuda/launches.h"

namespace bap_kernels {
namespace {

FamilySet of(std::initializer_list<CudaKernel> kernels, FamilyMath math) {
  FamilySet all = 0;
  for (const CudaKernel kernel : kernels) {
    const bool words = math == FamilyMath::kFloat16 || math == FamilyMath::kBFloat16;
    if (kernel != CudaKernel::kWgmma || words) all |= family(kernel, math);
  }
  return all;
}

FamilySet convolutions(const at::Tensor& t) {
  using enum CudaKernel;
  return of({kNhwc, kWgmma, kPlanar, kHalo, kPack}, math_of(t));
}

FamilySet gradients(const at::Tensor& t, bool input, bool weight) {
  using enum CudaKernel;
  FamilySet all = 0;
  if (input) all |= of({kInputGradient, kNhwc, kWgmma, kPlanar, kPack}, math_of(t));
  if (weight) all |= of({kWeightGradient, kPack}, math_of(t));
  return all;
}

}  // namespace

FamilySet cuda_families() {
  using enum CudaKernel;
  if (cuda_launcher() == nullptr) return 0;
  FamilySet all = 0;
  for (const FamilyMath math : {FamilyMath::kTf32, FamilyMath::kFloat16, FamilyMath::kBFloat16}) {
    all |= of({kNhwc, kWgmma, kPlanar, kHalo, kPack, kInputGradient, kWeightGradient, kSwitched, kMixed}, math);
  }
  return all;
}

FamilySet cuda_forward_families(const ConvCall& c) { return convolutions(c.input); }

FamilySet cuda_backward_families(const ConvBackwardCall& c) { return gradients(c.input, c.mask[0], c.mask[1]); }

FamilySet cuda_switched_families(const SwitchedCall& c) {
  return convolutions(c.input) | family(CudaKernel::kSwitched, math_of(c.input));
}

FamilySet cuda_switched_backward_families(const SwitchedBackwardCall& c) {
  const bool input = c.mask[kGradInput] || c.mask[kGradSwitch];
  return gradients(c.input, input, c.mask[kGradWeight]) | family(CudaKernel::kSwitched, math_of(c.input));
}

FamilySet cuda_mixed_families(const MixedCall& c) {
  return convolutions(c.input) | family(CudaKernel::kMixed, math_of(c.input));
}

}  // namespace bap_kernels
