// The kernel families of calls on the CUDA kernels; see dispatch/verdicts.h.
#pragma once

#include "dispatch/backend.h"

namespace bap_kernels {

// All that the loaded library has; none before it is loaded.
FamilySet cuda_families();

FamilySet cuda_forward_families(const ConvCall& call);
FamilySet cuda_backward_families(const ConvBackwardCall& call);
FamilySet cuda_switched_families(const SwitchedCall& call);
FamilySet cuda_switched_backward_families(const SwitchedBackwardCall& call);
FamilySet cuda_mixed_families(const MixedCall& call);

}  // namespace bap_kernels
