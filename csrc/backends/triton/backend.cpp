// The Triton kernels as a backend: private ops that bap_kernels/triton/private_ops.py implements. Results are allocated
// here, so that their memory formats are those of every other backend, and weights are packed here.
#include "dispatch/backend.h"

#include <ATen/ops/empty.h>

#include "dispatch/pack_weight.h"

namespace bap_kernels {
namespace {

// Calls a private op with `own` arguments and then those of the op that it computes.
template <OpName kName, class Result, class Args, class... Own>
Result call_with(const Args& args, const Own&... own) {
  return std::apply([&](const auto&... members) { return call_private<kName, Result>(own..., members...); },
                    args.tie());
}

at::Tensor forward(const ConvCall& c, const char* op) {
  const at::Tensor y = c.empty_result();
  OptionalTensor second;
  if (c.dual_store != nullptr && c.dual_store_index->size(0) > 0) second = c.empty_result(c.dual_store_index->size(0));
  // Depthwise calls are refused there.
  const at::Tensor packed = c.groups == 1 ? packed_by_filter(c) : at::Tensor();
  call_with<"_gathered_conv2d_triton", void>(c, y, packed, second, std::string_view(op));
  if (second) *c.dual_store = *std::move(second);
  return y;
}

GradientTriple backward(const ConvBackwardCall& c) {
  return call_with<"_gathered_conv2d_backward_triton", GradientTriple>(c);
}

void mixed(const MixedCall& c, const char*) {
  if (c.output.numel() == 0) return;
  OptionalTensorList in_indices;
  std::vector<int64_t> counts;
  std::vector<at::Tensor> packed;
  for (const MixedRun& run : c.runs) {
    in_indices.push_back(run.in_index);
    counts.push_back(run.input.size(0));
    packed.push_back(packed_by_filter(c.call(run)));
  }
  const GatheredConv2dMixedArgs<int64_t> args{c.input,  c.weight,  c.bias,     in_indices,    counts,
                                              c.stride, c.padding, c.dilation, c.cache_packed};
  call_with<"_gathered_conv2d_mixed_triton", void>(args, c.output, at::TensorList(packed));
}

at::Tensor switched(const SwitchedCall& c) {
  const auto& s = c.shape;
  const at::Tensor y =
      at::empty({s.batch, s.channels_out, s.out_h, s.out_w}, c.input.options().memory_format(c.format()));
  call_with<"_switched_conv2d_triton", void>(c, y);
  return y;
}

SwitchedGradients switched_backward(const SwitchedBackwardCall& c) {
  return call_with<"_switched_conv2d_backward_triton", SwitchedGradients>(c);
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
  define_private<GatheredConv2dFused>(m, "_gathered_conv2d_triton",
                                      "Tensor(a!) out, Tensor packed, Tensor(b!)? dual_store, str op, ", "()");
  define_private<GatheredConv2dMixed>(m, "_gathered_conv2d_mixed_triton", "Tensor(a!) out, Tensor[] packed, ", "()");
  define_private<GatheredConv2dBackward>(m, "_gathered_conv2d_backward_triton", "", "(Tensor, Tensor, Tensor)");
  define_private<SwitchedConv2d>(m, "_switched_conv2d_triton", "Tensor(a!) out, ", "()");
  define_private<SwitchedConv2dBackward>(m, "_switched_conv2d_backward_triton", "", "(Tensor, Tensor, Tensor, Tensor)");
}

}  // namespace bap_kernels
