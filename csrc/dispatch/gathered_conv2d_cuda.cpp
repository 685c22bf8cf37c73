// The gathered convolution on CUDA devices: by the backend that is named, or that measured fastest. List values are not
// read here.
#include <torch/library.h>

#include "backends/aten/gathered_conv2d.h"
#include "dispatch/named_backend.h"
#include "dispatch/route_cuda.h"
#include "dispatch/run_fused.h"

namespace bap_kernels {
namespace {

at::Tensor run_cuda(const ConvCall& call, const char* op) {
  if (call.trivial()) return trivial_gathered_conv2d(call);
  if (const NamedBackend* named = named_backend()) return named->forward(call, op);
  if (get_backend() != "auto") return aten_gathered_conv2d(call, AtenRoute::kGather);
  const auto run = [&](const ConvCall& c, Route route) { run_cuda_route(c, route, op); };
  const auto candidates = [&] { return cuda_candidate_routes(call, kShownRight); };
  return run_cuda_route(call, ChoiceTable::instance().choose(call, place_of(call.input), candidates, run), op);
}

at::Tensor gathered_conv2d_cuda(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                                const OptionalTensor& in_index, const OptionalTensor& out_index,
                                c10::IntArrayRef stride, c10::IntArrayRef padding, c10::IntArrayRef dilation,
                                int64_t groups, bool cache_packed) {
  const char* op = "gathered_conv2d";
  const auto s =
      check_gathered_conv2d<int64_t>(op, input, weight, bias, in_index, out_index, stride, padding, dilation, groups);
  return run_cuda({input, weight, bias, in_index, out_index, stride, padding, dilation, groups, cache_packed, s}, op);
}

}  // namespace

TORCH_LIBRARY_IMPL(bap_kernels, CUDA, m) {
  m.impl("gathered_conv2d", gathered_conv2d_cuda);
  m.impl("_gathered_conv2d_fused", run_fused<run_cuda>);
  m.impl("_gathered_conv2d_fused_copied", run_fused_copied<run_cuda>);
}

}  // namespace bap_kernels
