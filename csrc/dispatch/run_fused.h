// The fused ops on a device: checks, then `kRun`, the device's way from a checked call to a result.
#pragma once

#include "dispatch/list_copy.h"
#include "ops/conv_call.h"
#include "ops/gathered_conv2d_copied.h"

namespace bap_kernels {

using RunConv = at::Tensor(const ConvCall& call, const char* op);

// Raises on arguments and list values that break the contract. The lists are copies of the call's own.
inline ConvCall checked_fused_call(const char* op, const at::Tensor& input, const at::Tensor& weight,
                                   const OptionalTensor& bias, const OptionalTensor& in_index,
                                   const OptionalTensor& out_index, c10::IntArrayRef stride, c10::IntArrayRef padding,
                                   c10::IntArrayRef dilation, int64_t groups, Fusion fusion, bool cache_packed,
                                   const OptionalTensor& weight_index) {
  const auto s = check_gathered_conv2d_fused<int64_t>(op, input, weight, bias, in_index, out_index, stride, padding,
                                                      dilation, groups, fusion, weight_index);
  check_list_values(op, in_index, out_index, s.channels_in, s.channels_out, s.depthwise);
  check_weight_index_values(op, weight_index, weight.size(1));
  return {input,    weight, bias,         in_index, out_index,         stride,      padding,
          dilation, groups, cache_packed, s,        std::move(fusion), weight_index};
}

template <RunConv* kRun>
at::Tensor run_fused(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                     const OptionalTensor& in_index, const OptionalTensor& out_index, c10::IntArrayRef stride,
                     c10::IntArrayRef padding, c10::IntArrayRef dilation, int64_t groups,
                     const OptionalTensor& in_scale, const OptionalTensor& in_shift, bool in_relu,
                     const OptionalTensor& out_scale, const OptionalTensor& out_shift, const OptionalTensor& residual,
                     bool out_relu, bool cache_packed, const OptionalTensor& weight_index) {
  const char* op = "_gathered_conv2d_fused";
  const ListCopy in_list(in_index), out_list(out_index), weight_list(weight_index);
  return kRun(checked_fused_call(op, input, weight, bias, in_list.get(), out_list.get(), stride, padding, dilation,
                                 groups, Fusion{in_scale, in_shift, in_relu, out_scale, out_shift, residual, out_relu},
                                 cache_packed, weight_list.get()),
              op);
}

template <RunConv* kRun>
ResultAndCopy run_fused_copied(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                               const OptionalTensor& in_index, const OptionalTensor& out_index, c10::IntArrayRef stride,
                               c10::IntArrayRef padding, c10::IntArrayRef dilation, int64_t groups,
                               const OptionalTensor& in_scale, const OptionalTensor& in_shift, bool in_relu,
                               const OptionalTensor& out_scale, const OptionalTensor& out_shift,
                               const OptionalTensor& residual, bool out_relu, const at::Tensor& copy_index,
                               bool cache_packed, const OptionalTensor& weight_index) {
  const char* op = "_gathered_conv2d_fused_copied";
  const ListCopy in_list(in_index), out_list(out_index), weight_list(weight_index), copy_list(copy_index);
  ConvCall call = checked_fused_call(
      op, input, weight, bias, in_list.get(), out_list.get(), stride, padding, dilation, groups,
      Fusion{in_scale, in_shift, in_relu, out_scale, out_shift, residual, out_relu}, cache_packed, weight_list.get());
  check_copy_index(op, *copy_list.get(), input);
  check_copy_index_values(op, *copy_list.get(), call.shape.kept_out);
  at::Tensor copy;
  call.copy_index = copy_list.get();
  call.copy = &copy;
  at::Tensor result = kRun(call, op);
  if (!copy.defined()) copy = select_copy(result, *copy_list.get(), call.format());
  return {std::move(result), std::move(copy)};
}

}  // namespace bap_kernels
