// Schemas of the private ops of the Triton backend, and their callers. Results are allocated here, so that their
// memory formats are those of every other backend.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "dispatch/named_backend.h"
#include "dispatch/packed_cache.h"

namespace bap_kernels {
namespace {

using c10::IntArrayRef;

template <class Schema>
auto typed_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Schema>();
}

// Values are not compared there.
bool keeps(const ConvCall& c) { return PackedCache::trust(c) == PackedTrust::kSample; }

at::Tensor triton_gathered_conv2d(const ConvCall& c, const char* name) {
  static auto op =
      typed_op<void(at::Tensor&, const at::Tensor&, const at::Tensor&, const OptionalTensor&, const OptionalTensor&,
                    const OptionalTensor&, IntArrayRef, IntArrayRef, IntArrayRef, int64_t, const OptionalTensor&,
                    const OptionalTensor&, bool, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                    bool, bool, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, c10::string_view)>(
          "bap_kernels::_gathered_conv2d_triton");
  const auto& s = c.shape;
  const Fusion& f = c.fusion;
  const auto empty = [&](int64_t channels) {
    return at::empty({s.batch, channels, s.out_h, s.out_w}, c.input.options().memory_format(c.format()));
  };
  at::Tensor y = empty(s.kept_out);
  OptionalTensor copy;
  if (c.copy != nullptr && c.copy_index->size(0) > 0) copy = empty(c.copy_index->size(0));
  op.call(y, c.input, c.weight, c.bias, c.in_index, c.out_index, c.stride, c.padding, c.dilation, c.groups, f.in_scale,
          f.in_shift, f.in_relu, f.out_scale, f.out_shift, f.residual, f.out_relu, keeps(c), c.weight_index, copy,
          c.copy_index, name);
  if (copy) *c.copy = *std::move(copy);
  return y;
}

GradientTriple triton_gathered_conv2d_backward(const at::Tensor& grad_output, const at::Tensor& input,
                                               const at::Tensor& weight, const OptionalTensor& in_index,
                                               const OptionalTensor& out_index, IntArrayRef stride, IntArrayRef padding,
                                               IntArrayRef dilation, int64_t groups, std::array<bool, 3> mask) {
  static auto op =
      typed_op<GradientTriple(const at::Tensor&, const at::Tensor&, const at::Tensor&, const OptionalTensor&,
                              const OptionalTensor&, IntArrayRef, IntArrayRef, IntArrayRef, int64_t,
                              std::array<bool, 3>)>("bap_kernels::_gathered_conv2d_backward_triton");
  return op.call(grad_output, input, weight, in_index, out_index, stride, padding, dilation, groups, mask);
}

void triton_gathered_conv2d_mixed(const at::Tensor& output, const std::vector<MixedRun>& runs,
                                  const std::vector<ConvCall>& calls, const at::Tensor& input, const char*) {
  static auto op = typed_op<void(at::Tensor&, const at::Tensor&, const at::Tensor&, const OptionalTensor&,
                                 const OptionalTensorList&, IntArrayRef, IntArrayRef, IntArrayRef, IntArrayRef, bool)>(
      "bap_kernels::_gathered_conv2d_mixed_triton");
  if (output.numel() == 0) return;
  OptionalTensorList in_indices;
  std::vector<int64_t> counts;
  for (const MixedRun& run : runs) {
    in_indices.push_back(run.in_index);
    counts.push_back(run.input.size(0));
  }
  const ConvCall& c = calls.front();
  at::Tensor out = output;
  op.call(out, input, c.weight, c.bias, in_indices, counts, c.stride, c.padding, c.dilation, keeps(c));
}

at::Tensor triton_switched_conv2d(const SwitchedCall& c) {
  static auto op =
      typed_op<void(at::Tensor&, const at::Tensor&, const at::Tensor&, const OptionalTensor&, const at::Tensor&,
                    IntArrayRef, IntArrayRef, IntArrayRef, int64_t)>("bap_kernels::_switched_conv2d_triton");
  const auto& s = c.shape;
  at::Tensor y = at::empty({s.batch, s.channels_out, s.out_h, s.out_w}, c.input.options().memory_format(c.format()));
  op.call(y, c.input, c.weight, c.bias, c.switches, c.stride, c.padding, c.dilation, c.groups);
  return y;
}

SwitchedGradients triton_switched_conv2d_backward(const SwitchedCall& c, const at::Tensor& grad_output,
                                                  SwitchedMask mask) {
  static auto op =
      typed_op<SwitchedGradients(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                 IntArrayRef, IntArrayRef, IntArrayRef, int64_t, bool, SwitchedMask)>(
          "bap_kernels::_switched_conv2d_backward_triton");
  return op.call(grad_output, c.input, c.weight, c.switches, c.stride, c.padding, c.dilation, c.groups, c.off_gradient,
                 mask);
}

}  // namespace

std::string triton_why_not(const ConvCall& c) {
  static auto op =
      typed_op<std::string(const at::Tensor&, const at::Tensor&, int64_t, IntArrayRef)>("bap_kernels::_triton_why_not");
  return op.call(c.input, c.weight, c.groups, {c.shape.out_h, c.shape.out_w});
}

const NamedBackend triton_backend{triton_gathered_conv2d, triton_gathered_conv2d_backward, triton_switched_conv2d,
                                  triton_switched_conv2d_backward, triton_gathered_conv2d_mixed};

TORCH_LIBRARY_FRAGMENT(bap_kernels, m) {
  m.def("_triton_why_not(Tensor input, Tensor weight, int groups, int[2] out_size) -> str");
  m.def(
      "_gathered_conv2d_triton(Tensor(a!) out, Tensor input, Tensor weight, Tensor? bias, Tensor? in_index, "
      "Tensor? out_index, int[2] stride, int[4] padding, int[2] dilation, int groups, Tensor? in_scale, "
      "Tensor? in_shift, bool in_relu, Tensor? out_scale, Tensor? out_shift, Tensor? residual, bool out_relu, "
      "bool cache_packed, Tensor? weight_index, Tensor(b!)? copy, Tensor? copy_index, str op) -> ()");
  m.def(
      "_gathered_conv2d_mixed_triton(Tensor(a!) out, Tensor input, Tensor weight, Tensor? bias, "
      "Tensor?[] in_indices, int[] counts, int[2] stride, int[4] padding, int[2] dilation, bool cache_packed) -> ()");
  m.def(
      "_gathered_conv2d_backward_triton(Tensor grad_output, Tensor input, Tensor weight, Tensor? in_index, "
      "Tensor? out_index, int[2] stride, int[4] padding, int[2] dilation, int groups, bool[3] output_mask) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "_switched_conv2d_triton(Tensor(a!) out, Tensor input, Tensor weight, Tensor? bias, Tensor switch, "
      "int[2] stride, int[4] padding, int[2] dilation, int groups) -> ()");
  m.def(
      "_switched_conv2d_backward_triton(Tensor grad_output, Tensor input, Tensor weight, Tensor switch, "
      "int[2] stride, int[4] padding, int[2] dilation, int groups, bool off_gradient, bool[4] output_mask) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
}

}  // namespace bap_kernels
