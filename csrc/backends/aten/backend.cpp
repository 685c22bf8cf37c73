// ATen as a backend: it covers every call on every device.
#include "dispatch/backend.h"

#include "backends/aten/gathered_conv2d.h"
#include "backends/aten/packed_convolution.h"
#include "backends/aten/switched_conv2d.h"

namespace bap_kernels {
namespace {

void add_candidates(const ConvCall& c, c10::DeviceType device, std::vector<Candidate>& candidates) {
  const bool cpu = device == c10::kCPU, last = c.format() == at::MemoryFormat::ChannelsLast;
  candidates.push_back(Candidate::kGather);
  if (has_value(c.in_index) && last && c.input.is_contiguous(c.format())) candidates.push_back(Candidate::kGatherFlat);
  if (cpu && packed_convolution_applies(c)) candidates.push_back(Candidate::kGatherPacked);
  if (dense_applies(c)) candidates.push_back(cpu ? Candidate::kDense : Candidate::kMasked);
}

const Backend kAten{
    .name = "aten",
    .opt_in = false,
    .unavailable_reason = [] { return std::string(); },
    .unsupported_reason = [](const ConvCall&) { return std::string(); },
    .backward_unsupported_reason = [](const at::Tensor&, const ConvShape<int64_t>&) { return std::string(); },
    .add_candidates = add_candidates,
    .run = [](const ConvCall& c, Candidate candidate, const char*) { return aten_gathered_conv2d(c, candidate); },
    .forward = [](const ConvCall& c, const char*) { return aten_gathered_conv2d(c, Candidate::kGather); },
    .backward = aten_gathered_conv2d_backward,
    .switched = masked_switched_conv2d,
    .switched_backward = aten_switched_conv2d_backward,
    .mixed = nullptr,
};
const RegisterBackend registered(BackendId::kAten, kAten);

}  // namespace
}  // namespace bap_kernels
