// The gathered convolution on CPUs: checks, then the backend that the user named or that measured fastest.
#include <torch/library.h>

#include "backends/aten/gathered_conv2d.h"
#include "backends/aten/packed_convolution.h"
#include "backends/cpu/native.h"
#include "dispatch/choice.h"
#include "dispatch/list_copy.h"
#include "dispatch/named_backend.h"
#include "dispatch/run_cpu.h"
#include "dispatch/run_fused.h"

namespace bap_kernels {

std::vector<Route> candidate_routes(const ConvCall& c) {
  std::vector<Route> routes;
  if (native_why_not(c).empty()) routes.push_back(Route::kNative);
  routes.push_back(Route::kGather);
  const bool last = c.format() == at::MemoryFormat::ChannelsLast;
  if (has_value(c.in_index) && last && c.input.is_contiguous(c.format())) routes.push_back(Route::kGatherFlat);
  if (packed_convolution_applies(c)) routes.push_back(Route::kGatherPacked);
  if (dense_route_applies(c)) routes.push_back(Route::kDense);
  return routes;
}

at::Tensor run_route(const ConvCall& c, Route route) {
  switch (route) {
    case Route::kNative:
      return native_gathered_conv2d(c);
    case Route::kGather:
      return aten_gathered_conv2d(c, AtenRoute::kGather);
    case Route::kGatherFlat:
      return aten_gathered_conv2d(c, AtenRoute::kGatherFlat);
    case Route::kGatherPacked:
      return aten_gathered_conv2d(c, AtenRoute::kGatherPacked);
    case Route::kDense:
      return aten_gathered_conv2d(c, AtenRoute::kDense);
    default:  // routes of GPUs
      break;
  }
  TORCH_INTERNAL_ASSERT(false);
}

at::Tensor run_cpu(const ConvCall& c, const char* op) {
  if (c.trivial()) return trivial_gathered_conv2d(c);
  const std::string& backend = get_backend();
  if (backend == "aten") return run_route(c, Route::kGather);
  if (const NamedBackend* named = named_backend()) return named->forward(c, op);
  if (backend == "native") {
    const std::string reason = native_why_not(c);
    TORCH_CHECK_NOT_IMPLEMENTED(reason.empty(), op,
                                "(): expected a call that backend `native` can run, got one that it cannot: ", reason,
                                ". Hint: use_backend(\"auto\") takes the ATen path where native cannot run.");
    return native_gathered_conv2d(c);
  }
  const auto run = [](const ConvCall& call, Route r) { run_route(call, r); };
  return run_route(c, ChoiceTable::instance().choose(c, cpu_place(), [&] { return candidate_routes(c); }, run));
}

namespace {

at::Tensor gathered_conv2d_cpu(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                               const OptionalTensor& in_index, const OptionalTensor& out_index, c10::IntArrayRef stride,
                               c10::IntArrayRef padding, c10::IntArrayRef dilation, int64_t groups, bool cache_packed) {
  const char* op = "gathered_conv2d";
  const ListCopy in_list(in_index), out_list(out_index);
  const ConvCall call{input,
                      weight,
                      bias,
                      in_list.get(),
                      out_list.get(),
                      stride,
                      padding,
                      dilation,
                      groups,
                      cache_packed,
                      check_gathered_conv2d<int64_t>(op, input, weight, bias, in_list.get(), out_list.get(), stride,
                                                     padding, dilation, groups)};
  check_list_values(op, call.in_index, call.out_index, call.shape.channels_in, call.shape.channels_out,
                    call.shape.depthwise);
  return run_cpu(call, op);
}

}  // namespace

TORCH_LIBRARY_IMPL(bap_kernels, CPU, m) {
  m.impl("gathered_conv2d", gathered_conv2d_cpu);
  m.impl("_gathered_conv2d_fused", run_fused<run_cpu>);
  m.impl("_gathered_conv2d_fused_copied", run_fused_copied<run_cpu>);
}

}  // namespace bap_kernels
