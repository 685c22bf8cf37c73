// The Triton kernels as a backend: private ops that bap_kernels/triton/private_ops.py implements. Results are allocated
// here, so that their memory formats are those of every other backend.
#include "dispatch/backend.h"

#include <ATen/ops/empty.h>

#include "dispatch/packed_cache.h"

namespace bap_kernels {
namespace {

// Values are not compared there.
bool keeps(const ConvCall& c) { return PackedCache::trust(c) == PackedTrust::kSample; }

at::Tensor forward(const ConvCall& c, const char* op) {
  const at::Tensor y = c.empty_result();
  OptionalTensor second;
  if (c.dual_store != nullptr && c.dual_store_index->size(0) > 0) second = c.empty_result(c.dual_store_index->size(0));
  const GatheredConv2dFusedArgs<int64_t> args{c, c.fusion, keeps(c), c.weight_index, c.dual_store_index};
  std::apply(
      [&](const auto&... members) {
        call_private<"_gathered_conv2d_triton", void>(y, members..., second, std::string_view(op));
      },
      args.tie());
  if (second) *c.dual_store = *std::move(second);
  return y;
}

GradientTriple backward(const ConvBackwardCall& c) {
  return std::apply(
      [](const auto&... members) {
        return call_private<"_gathered_conv2d_backward_triton", GradientTriple>(members...);
      },
      c.tie());
}

void mixed(const MixedCall& c, const char*) {
  if (c.output.numel() == 0) return;
  OptionalTensorList in_indices;
  std::vector<int64_t> counts;
  for (const MixedRun& run : c.runs) {
    in_indices.push_back(run.in_index);
    counts.push_back(run.input.size(0));
  }
  call_private<"_gathered_conv2d_mixed_triton", void>(c.output, c.input, c.weight, c.bias, in_indices,
                                                      c10::IntArrayRef(counts), c.stride, c.padding, c.dilation,
                                                      keeps(c.call(c.runs.front())));
}

at::Tensor switched(const SwitchedCall& c) {
  const auto& s = c.shape;
  const at::Tensor y =
      at::empty({s.batch, s.channels_out, s.out_h, s.out_w}, c.input.options().memory_format(c.format()));
  call_private<"_switched_conv2d_triton", void>(y, c.input, c.weight, c.bias, c.switches, c.stride, c.padding,
                                                c.dilation, c.groups);
  return y;
}

SwitchedGradients switched_backward(const SwitchedBackwardCall& c) {
  return call_private<"_switched_conv2d_backward_triton", SwitchedGradients>(
      c.grad_output, c.input, c.weight, c.switches, c.stride, c.padding, c.dilation, c.groups, c.off_gradient, c.mask);
}

std::string unsupported_reason(const ConvCall& c) {
  const std::array<int64_t, 2> out_size = {c.shape.out_h, c.shape.out_w};
  return call_private<"_triton_unsupported_reason", std::string>(c.input, c.weight, c.groups,
                                                                 c10::IntArrayRef(out_size));
}

// From Python, which knows the launches. `mask` is that of a backward; empty for a forward.
FamilySet families(std::string_view op, const OptionalTensor& grad_output, const ConvArgs<int64_t>& args,
                   const OptionalTensorList& in_indices, const ConvShape<int64_t>& shape, bool prologue,
                   c10::ArrayRef<bool> mask) {
  const std::array<int64_t, 2> out_size = {shape.out_h, shape.out_w};
  return families_of(call_private<"_triton_families", std::vector<std::string>>(
      op, grad_output, args.input, args.weight, in_indices, args.out_index, args.stride, args.padding, args.dilation,
      c10::IntArrayRef(out_size), prologue, mask));
}

OptionalTensorList one_list(const OptionalTensor& in_index) {
  OptionalTensorList lists;
  lists.push_back(in_index);
  return lists;
}

FamilySet forward_families(const ConvCall& c) {
  return families(GatheredConv2d::kName, kAbsent, c, one_list(c.in_index), c.shape, c.fusion.has_prologue(), {});
}

FamilySet backward_families(const ConvBackwardCall& c) {
  return families(GatheredConv2dBackward::kName, c.grad_output, c.GatheredConv2dBackwardArgs<int64_t>::forward(),
                  one_list(c.in_index), c.shape, /*prologue=*/false, c.mask);
}

FamilySet switched_families(const SwitchedCall& c) {
  return families(SwitchedConv2d::kName, kAbsent, c.conv(), one_list(kAbsent), c.shape, /*prologue=*/false, {});
}

FamilySet switched_backward_families(const SwitchedBackwardCall& c) {
  return families(SwitchedConv2dBackward::kName, c.grad_output, c.forward().conv(), one_list(kAbsent), c.shape,
                  /*prologue=*/false, c.mask);
}

FamilySet mixed_families(const MixedCall& c) {
  OptionalTensorList in_indices;
  for (const MixedRun& run : c.runs) in_indices.push_back(run.in_index);
  return families(GatheredConv2dMixed::kName, kAbsent, c.with_list(kAbsent), in_indices, c.shape, /*prologue=*/false,
                  {});
}

const Backend kTriton{
    .name = "triton",
    .opt_in = true,
    .unavailable_reason = [] { return python_unavailable_reason("triton"); },
    .unsupported_reason = unsupported_reason,
    .backward_unsupported_reason = [](const at::Tensor&, const ConvShape<int64_t>&) { return std::string(); },
    .add_candidates = [](const ConvCall&, c10::DeviceType, std::vector<Candidate>&) {},
    .run = [](const ConvCall& call, Candidate, const char* op) { return forward(call, op); },
    .forward = forward,
    .backward = backward,
    .switched = switched,
    .switched_backward = switched_backward,
    .mixed = mixed,
    .forward_families = forward_families,
    .backward_families = backward_families,
    .switched_families = switched_families,
    .switched_backward_families = switched_backward_families,
    .mixed_families = mixed_families,
};
const RegisterBackend registered(BackendId::kTriton, kTriton);

}  // namespace

TORCH_LIBRARY_FRAGMENT(bap_kernels, m) {
  // Names of the kernel families that a call of `op` runs; an absent list in `in_indices` stands for all channels.
  m.def(
      "_triton_families(str op, Tensor? grad_output, Tensor input, Tensor weight, Tensor?[] in_indices, "
      "Tensor? out_index, int[2] stride, int[4] padding, int[2] dilation, int[2] out_size, bool prologue, "
      "bool[] output_mask) -> str[]");
  m.def("_triton_unsupported_reason(Tensor input, Tensor weight, int groups, int[2] out_size) -> str");
  m.def(
      "_gathered_conv2d_triton(Tensor(a!) out, Tensor input, Tensor weight, Tensor? bias, Tensor? in_index, "
      "Tensor? out_index, int[2] stride, int[4] padding, int[2] dilation, int groups, Tensor? in_scale, "
      "Tensor? in_shift, bool in_relu, Tensor? out_scale, Tensor? out_shift, Tensor? residual, bool out_relu, "
      "bool cache_packed, Tensor? weight_index, Tensor? dual_store_index, Tensor(b!)? dual_store, str op) -> ()");
  m.def(
      "_gathered_conv2d_mixed_triton(Tensor(a!) out, Tensor input, Tensor weight, Tensor? bias, Tensor?[] in_indices, "
      "int[] counts, int[2] stride, int[4] padding, int[2] dilation, bool cache_packed) -> ()");
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
