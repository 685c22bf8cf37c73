// Schemas of the switched convolution's ops, their checks and their Meta kernels.
#include "ops/switched_conv2d.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/irange.h>

#include <iomanip>
#include <limits>

namespace bap_kernels {

using c10::SymInt;

template <class Int>
ConvShape<Int> check_switched_conv2d(const char* op, const SwitchedConv2dArgs<Int>& a) {
  const auto s = check_conv<Int>(op, a.conv());
  const auto& [input, switches, read] = std::tie(a.input, a.switches, a.read);
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
  if (!has_value(read)) return s;
  TORCH_CHECK_TYPE(read->scalar_type() == at::kBool, op, "(): expected `read` to be bool, got ", read->scalar_type(),
                   ". Hint: it says of each output channel whether anything reads it.");
  TORCH_CHECK_VALUE(read->device() == input.device(), op, "(): expected `read` to be on the input's device ",
                    input.device(), ", got ", read->device(), ".");
  TORCH_CHECK_VALUE(read->dim() == 1 && read->sym_size(0) == s.channels_out, op,
                    "(): expected `read` to have the shape (C_out,) = (", s.channels_out, ",), got ", read->sym_sizes(),
                    ". Hint: it has one entry for each output channel.");
  return s;
}

template ConvShape<int64_t> check_switched_conv2d(const char*, const SwitchedConv2dArgs<int64_t>&);
template ConvShape<SymInt> check_switched_conv2d(const char*, const SwitchedConv2dArgs<SymInt>&);

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
                      ". Hint: compare scores with a threshold; hard + (score - "
                      "score.detach()) keeps the values as "
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

at::Tensor forward_meta(const SwitchedConv2dArgs<SymInt>& a) {
  const auto s = check_switched_conv2d<SymInt>(SwitchedConv2d::kName, a);
  const std::array<SymInt, 4> sizes = {s.batch, s.channels_out, s.out_h, s.out_w};
  return at::empty_symint(sizes, a.input.options().memory_format(a.input.suggest_memory_format()));
}

SwitchedGradients backward_meta(const SwitchedConv2dBackwardArgs<SymInt>& a) {
  const auto s = check_switched_conv2d_backward<SymInt>(SwitchedConv2dBackward::kName, a);
  const auto vector = [](bool computed, const SymInt& length, const at::Tensor& like) {
    return at::empty_symint({computed ? length : SymInt(0)}, like.options().memory_format(std::nullopt));
  };
  return {a.mask[kGradInput] ? at::empty_like(a.input) : vector(false, 0, a.input),
          a.mask[kGradWeight] ? at::empty_like(a.weight) : vector(false, 0, a.input),
          vector(a.mask[kGradBias], s.channels_out, a.input), vector(a.mask[kGradSwitch], s.channels_in, a.switches)};
}

}  // namespace

SwitchLists read_switch(const char* op, const at::Tensor& switches) {
  return switches.scalar_type() == at::kDouble ? read_values<double>(op, switches) : read_values<float>(op, switches);
}

TORCH_LIBRARY_FRAGMENT(bap_kernels, m) {
  define<SwitchedConv2d>(m);
  define<SwitchedConv2dBackward>(m);
  define<SwitchedConv2dMasked>(m);
  define<SwitchedConv2dMaskedBackward>(m);
}

TORCH_LIBRARY_IMPL(bap_kernels, Meta, m) {
  implement<SwitchedConv2d, forward_meta>(m);
  implement<SwitchedConv2dBackward, backward_meta>(m);
  implement<SwitchedConv2dMasked, forward_meta>(m);
  implement<SwitchedConv2dMaskedBackward, backward_meta>(m);
}

}  // namespace bap_kernels
