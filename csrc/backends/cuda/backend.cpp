// The CUDA C++ kernels as a backend.
#include "dispatch/backend.h"

#include "backends/cuda/families.h"
#include "backends/cuda/routes.h"

namespace bap_kernels {
namespace {

const Backend kCuda{
    .name = "cuda",
    .opt_in = true,
    .unavailable_reason = [] { return python_unavailable_reason("cuda"); },
    .unsupported_reason =
        [](const ConvCall& c) { return uncovered_reason(c.input, c.weight, c.groups, c.shape.out_h, c.shape.out_w); },
    .backward_unsupported_reason = [](const at::Tensor&, const ConvShape<int64_t>&) { return std::string(); },
    .add_candidates = [](const ConvCall&, c10::DeviceType, std::vector<Candidate>&) {},
    .run = [](const ConvCall& call, Candidate, const char* op) { return cuda_gathered_conv2d(call, op); },
    .forward = cuda_gathered_conv2d,
    .backward = cuda_gathered_conv2d_backward,
    .switched = cuda_switched_conv2d,
    .switched_backward = cuda_switched_conv2d_backward,
    .mixed = cuda_gathered_conv2d_mixed,
    .forward_families = cuda_forward_families,
    .backward_families = cuda_backward_families,
    .switched_families = cuda_switched_families,
    .switched_backward_families = cuda_switched_backward_families,
    .mixed_families = cuda_mixed_families,
};
const RegisterBackend registered(BackendId::kCuda, kCuda);

}  // namespace
}  // namespace bap_kernels
