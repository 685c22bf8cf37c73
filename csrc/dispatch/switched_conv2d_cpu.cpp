// The switched convolution on CPUs: the switch becomes lists, and what they name is computed.
#include <torch/library.h>

#include "backends/aten/switched_conv2d.h"
#include "backends/cpu/native.h"
#include "dispatch/named_backend.h"
#include "dispatch/run_cpu.h"

namespace bap_kernels {
namespace {

at::Tensor switched_conv2d_cpu(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                               const at::Tensor& switches, c10::IntArrayRef stride, c10::IntArrayRef padding,
                               c10::IntArrayRef dilation, int64_t groups, bool off_gradient, const OptionalTensor& read,
                               int64_t) {
  const char* op = "switched_conv2d";
  const SwitchedCall call{
      input,
      weight,
      bias,
      switches,
      stride,
      padding,
      dilation,
      groups,
      off_gradient,
      check_switched_conv2d<int64_t>(op, input, weight, bias, switches, stride, padding, dilation, groups)};
  check_read<int64_t>(op, read, call.shape, input);
  const SwitchLists lists = read_switch(op, switches);
  if (const NamedBackend* named = call.trivial() ? nullptr : named_backend()) return named->switched(call);
  const ConvCall on = call.on(lists.on);
  // Switches move from step to step, and each count of channels is a case of its own: `auto` would never stop
  // measuring.
  const bool native = get_backend() == "auto" && !on.trivial() && native_why_not(on).empty();
  return widened_result(call, lists, native ? run_route(on, Route::kNative) : run_cpu(on, op));
}

}  // namespace

TORCH_LIBRARY_IMPL(bap_kernels, CPU, m) { m.impl("switched_conv2d", switched_conv2d_cpu); }

}  // namespace bap_kernels
