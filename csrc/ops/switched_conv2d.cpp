// Schemas of the switched convolution's ops, their checks and their Meta kernels.
#include "ops/switched_conv2d.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/irange.h>
#include <torch/library.h>

#include <iomanip>
#include <limits>

#include "ops/switched_call.h"

namespace bap_kernels {

using c10::SymInt;
using c10::SymIntArrayRef;

template <class Int>
ConvShape<Int> check_switched_conv2d(const char* op, const at::Tensor& input, const at::Tensor& weight,
                                     const OptionalTensor& bias, const at::Tensor& switches, c10::ArrayRef<Int> stride,
                                     c10::ArrayRef<Int> padding, c10::ArrayRef<Int> dilation, const Int& groups) {
  const auto s = check_gathered_conv2d<Int>(op, input, weight, bias, {}, {}, stride, padding, dilation, groups);
  TORCH_CHECK_TYPE(switches.defined(), op, "(): expected `switch` to be a tensor, got None. Hint: use ",
                   "torch.nn.functional.conv2d where there is nothing to switch.");
  const auto dtype = switches.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || (dtype == at::kDouble && input.scalar_type() == at::kDouble), op,
                   "(): expected `switch` to be float32, or float64 as the input is, got ", dtype,
                   ". Hint: convert it with .float().");
  TORCH_CHECK_VALUE(switches.device() == input.device(), op, "(): expected `switch` to be on the input's device ",
                    input.device(), ", got ", switches.device(), ".");
  TORCH_CHECK_VALUE(switches.dim() == 1 && switches.sym_size(0) == s.channels_in, op,
                    "(): expected `switch` to have the shape (C_in,) = (", s.channels_in, ",), got ",
                    switches.sym_sizes(), ". Hint: it has one entry for each input channel.");
  return s;
}

template ConvShape<int64_t> check_switched_conv2d(const char*, const at::Tensor&, const at::Tensor&,
                                                  const OptionalTensor&, const at::Tensor&, c10::ArrayRef<int64_t>,
                                                  c10::ArrayRef<int64_t>, c10::ArrayRef<int64_t>, const int64_t&);
template ConvShape<SymInt> check_switched_conv2d(const char*, const at::Tensor&, const at::Tensor&,
                                                 const OptionalTensor&, const at::Tensor&, c10::ArrayRef<SymInt>,
                                                 c10::ArrayRef<SymInt>, c10::ArrayRef<SymInt>, const SymInt&);

template <class Int>
void check_read(const char* op, const OptionalTensor& read, const ConvShape<Int>& s, const at::Tensor& input) {
  if (!has_value(read)) return;
  TORCH_CHECK_TYPE(read->scalar_type() == at::kBool, op, "(): expected `read` to be bool, got ", read->scalar_type(),
                   ". Hint: it says of each output channel whether anything reads it.");
  TORCH_CHECK_VALUE(read->device() == input.device(), op, "(): expected `read` to be on the input's device ",
                    input.device(), ", got ", read->device(), ".");
  TORCH_CHECK_VALUE(read->dim() == 1 && read->sym_size(0) == s.channels_out, op,
                    "(): expected `read` to have the shape (C_out,) = (", s.channels_out, ",), got ", read->sym_sizes(),
                    ". Hint: it has one entry for each output channel.");
}

template void check_read(const char*, const OptionalTensor&, const ConvShape<int64_t>&, const at::Tensor&);
template void check_read(const char*, const OptionalTensor&, const ConvShape<SymInt>&, const at::Tensor&);

namespace {

template <class scalar_t>
SwitchLists read_values(const char* op, const at::Tensor& switches) {
  const at::Tensor dense = switches.contiguous();
  const scalar_t* s = dense.const_data_ptr<scalar_t>();
  const int64_t n = dense.numel();
  int64_t kept = 0;
  for (const auto c : c10::irange(n)) {
    TORCH_CHECK_VALUE(s[c] == 0 || s[c] == 1, op, "(): expected `switch` to hold zeros and ones, got ",
                      std::setprecision(std::numeric_limits<scalar_t>::max_digits10), s[c], " for channel ", c,
                      ". Hint: compare scores with a threshold; hard + (score - score.detach()) keeps the values as "
                      "they are, hard + score - score.detach() rounds them.");
    kept += s[c] == 1;
  }
  const auto list_of = [&](int64_t length, scalar_t value) {
    at::Tensor list = at::empty({length}, dense.options().dtype(at::kInt));
    int32_t* p = list.mutable_data_ptr<int32_t>();
    for (const auto c : c10::irange(n)) {
      if (s[c] == value) *p++ = static_cast<int32_t>(c);
    }
    return list;
  };
  return {kept == n ? OptionalTensor() : list_of(kept, 1), list_of(n - kept, 0)};
}

at::Tensor switched_conv2d_meta(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                                const at::Tensor& switches, SymIntArrayRef stride, SymIntArrayRef padding,
                                SymIntArrayRef dilation, SymInt groups, bool, const OptionalTensor& read, int64_t) {
  const auto s = check_switched_conv2d<SymInt>("switched_conv2d", input, weight, bias, switches, stride, padding,
                                               dilation, groups);
  check_read<SymInt>("switched_conv2d", read, s, input);
  const std::array<SymInt, 4> sizes = {s.batch, s.channels_out, s.out_h, s.out_w};
  return at::empty_symint(sizes, input.options().memory_format(input.suggest_memory_format()));
}

SwitchedGradients backward_meta(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& weight,
                                const at::Tensor& switches, SymIntArrayRef stride, SymIntArrayRef padding,
                                SymIntArrayRef dilation, SymInt groups, bool, SwitchedMask mask,
                                const OptionalTensor& read, int64_t) {
  const char* op = "switched_conv2d_backward";
  const auto s = check_switched_conv2d<SymInt>(op, input, weight, {}, switches, stride, padding, dilation, groups);
  check_grad_output<SymInt>(op, grad_output, s, input);
  check_read<SymInt>(op, read, s, input);
  const auto made = [](bool wanted, const SymInt& length, const at::Tensor& like) {
    return at::empty_symint({wanted ? length : SymInt(0)}, like.options().memory_format(std::nullopt));
  };
  return {mask[kGradInput] ? at::empty_like(input) : made(false, 0, input),
          mask[kGradWeight] ? at::empty_like(weight) : made(false, 0, input),
          made(mask[kGradBias], s.channels_out, input), made(mask[kGradSwitch], s.channels_in, switches)};
}

}  // namespace

SwitchLists read_switch(const char* op, const at::Tensor& switches) {
  return switches.scalar_type() == at::kDouble ? read_values<double>(op, switches) : read_values<float>(op, switches);
}

TORCH_LIBRARY_FRAGMENT(bap_kernels, m) {
  m.def(
      "switched_conv2d(Tensor input, Tensor weight, Tensor? bias, Tensor switch, SymInt[2] stride, SymInt[4] padding, "
      "SymInt[2] dilation, SymInt groups, bool off_gradient=True, Tensor? read=None, int reader=0) -> Tensor");
  m.def(
      "switched_conv2d_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor switch, SymInt[2] stride, "
      "SymInt[4] padding, SymInt[2] dilation, SymInt groups, bool off_gradient, bool[4] output_mask, "
      "Tensor? read=None, int reader=0) "
      "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias, Tensor grad_switch)");
  // The way of a GPU on any device, for tests and comparisons; without gradients of its own.
  m.def(
      "_switched_conv2d_masked(Tensor input, Tensor weight, Tensor? bias, Tensor switch, SymInt[2] stride, "
      "SymInt[4] padding, SymInt[2] dilation, SymInt groups, bool off_gradient=True, Tensor? read=None, "
      "int reader=0) -> Tensor");
  m.def(
      "_switched_conv2d_masked_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor switch, "
      "SymInt[2] stride, SymInt[4] padding, SymInt[2] dilation, SymInt groups, bool off_gradient, bool[4] output_mask, "
      "Tensor? read=None, int reader=0) "
      "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias, Tensor grad_switch)");
}

TORCH_LIBRARY_IMPL(bap_kernels, Meta, m) {
  m.impl("switched_conv2d", switched_conv2d_meta);
  m.impl("switched_conv2d_backward", backward_meta);
  m.impl("_switched_conv2d_masked", switched_conv2d_meta);
  m.impl("_switched_conv2d_masked_backward", backward_meta);
}

}  // namespace bap_kernels
