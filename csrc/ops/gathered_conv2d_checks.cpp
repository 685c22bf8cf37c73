// Checks of the gathered convolution; they stand here once and serve every device and every tracing mode.
#include <c10/util/Exception.h>
#include <c10/util/irange.h>

#include <string>
#include <vector>

#include "ops/gathered_conv2d.h"
#include "ops/listed_channels.h"

namespace bap_kernels {
namespace {

template <class Int>
c10::ArrayRef<Int> sizes_of(const at::Tensor& t);
template <>
c10::ArrayRef<int64_t> sizes_of<int64_t>(const at::Tensor& t) {
  return t.sizes();
}
template <>
c10::ArrayRef<c10::SymInt> sizes_of<c10::SymInt>(const at::Tensor& t) {
  return t.sym_sizes();
}

template <class Int>
void check_pair(const char* op, const char* name, c10::ArrayRef<Int> value, size_t length, int64_t least) {
  TORCH_CHECK_VALUE(value.size() == length, op, "(): expected `", name, "` to have ", length, " entries, got ",
                    value.size(), ".");
  for (const auto& v : value) {
    TORCH_CHECK_VALUE(v >= least, op, "(): expected `", name, "` to be at least ", least, ", got ", value, ".");
  }
}

// Output length of one spatial axis, as in torch.nn.Conv2d.
template <class Int>
Int out_length(const Int& in, const Int& pad, const Int& kernel, const Int& dilation, const Int& stride) {
  return (in + pad - dilation * (kernel - 1) - 1) / stride + 1;
}

void check_range_and_repeats(const char* op, const char* name, const at::Tensor& list, int64_t channels) {
  const at::Tensor dense = list.contiguous();
  const int32_t* p = dense.const_data_ptr<int32_t>();
  const int64_t n = dense.numel();
  int32_t low = 0, high = -1;
  bool increasing = true;
  for (const auto i : c10::irange(n)) {
    low = std::min(low, p[i]);
    high = std::max(high, p[i]);
    increasing &= i == 0 || p[i] > p[i - 1];
  }
  if (low < 0 || high >= channels) {
    const int32_t bad = low < 0 ? low : high;
    TORCH_CHECK_INDEX(false, op, "(): expected `", name, "` to hold channel numbers from 0 to ", channels - 1, ", got ",
                      bad, ".");
  }
  if (increasing) return;
  std::vector<bool> seen(channels, false);
  for (const auto i : c10::irange(n)) {
    TORCH_CHECK_VALUE(!seen[p[i]], op, "(): expected `", name, "` to hold each channel at most once, got channel ",
                      p[i], " more than once.");
    seen[p[i]] = true;
  }
}

}  // namespace

void check_list(const char* op, const char* name, const OptionalTensor& list, const at::Tensor& input) {
  if (!has_value(list)) return;
  TORCH_CHECK_TYPE(list->scalar_type() == at::kInt, op, "(): expected `", name, "` to be an int32 list, got ",
                   list->scalar_type(), ". Hint: convert it once with .to(torch.int32).");
  TORCH_CHECK_VALUE(list->dim() == 1, op, "(): expected `", name, "` to be 1-D, got ", list->dim(), " dimensions.");
  TORCH_CHECK_VALUE(list->device() == input.device(), op, "(): expected `", name, "` to be on the input's device ",
                    input.device(), ", got ", list->device(), ". Hint: move it once with .to(input.device).");
}

bool same_list(const OptionalTensor& a, const OptionalTensor& b) {
  if (!has_value(a) || !has_value(b)) return has_value(a) == has_value(b);
  const auto one = a->expect_contiguous(), other = b->expect_contiguous();
  return one->numel() == other->numel() &&
         std::equal(one->const_data_ptr<int32_t>(), one->const_data_ptr<int32_t>() + one->numel(),
                    other->const_data_ptr<int32_t>());
}

template <class Int>
ConvShape<Int> check_conv(const char* op, const ConvArgs<Int>& args, const OptionalTensor& weight_index) {
  const auto& [input, weight, bias, in_index, out_index, stride, padding, dilation, groups] = args;
  TORCH_CHECK_VALUE(input.dim() == 4, op, "(): expected `input` to have the shape (N, C_in, H, W), got ", input.dim(),
                    " dimensions. Hint: ",
                    input.dim() == 3 ? "add a batch axis with input.unsqueeze(0)."
                                     : "images have 4; further axes go into the batch with input.flatten(0, -4).");
  TORCH_CHECK_VALUE(weight.dim() == 4, op,
                    "(): expected `weight` to have the shape (C_out, C_in / groups, kH, kW), got ", weight.dim(),
                    " dimensions.");
  const auto dtype = input.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf, op,
                   "(): expected `input` to be float32, float64, bfloat16 or float16, got ", dtype, ".");
  TORCH_CHECK_TYPE(weight.scalar_type() == dtype, op, "(): expected `weight` to have the input's dtype ", dtype,
                   ", got ", weight.scalar_type(), ".");
  TORCH_CHECK_VALUE(weight.device() == input.device(), op, "(): expected `weight` to be on the input's device ",
                    input.device(), ", got ", weight.device(), ".");
  check_pair(op, "stride", stride, 2, 1);
  check_pair(op, "padding", padding, 4, 0);
  check_pair(op, "dilation", dilation, 2, 1);
  check_list(op, "in_index", in_index, input);
  check_list(op, "out_index", out_index, input);
  check_list(op, "weight_index", weight_index, input);

  const auto x = sizes_of<Int>(input);
  const auto w = sizes_of<Int>(weight);
  ConvShape<Int> s{x[0], x[1], x[2], x[3], w[0], w[2], w[3], x[1], w[0], 0, 0, false};
  TORCH_CHECK_VALUE(s.kernel_h >= 1 && s.kernel_w >= 1, op,
                    "(): expected `weight` to have a kernel of at least 1 x 1, got ", s.kernel_h, " x ", s.kernel_w,
                    ".");
  TORCH_CHECK_VALUE(groups >= 1, op, "(): expected `groups` to be at least 1, got ", groups, ".");
  if (has_value(weight_index)) {
    TORCH_CHECK_NOT_IMPLEMENTED(groups == 1, op, "(): expected `weight_index` only with groups=1, got groups=", groups,
                                ". Hint: select the filters of a depthwise convolution beforehand.");
    const Int read = has_value(in_index) ? sizes_of<Int>(*in_index)[0] : s.channels_in;
    TORCH_CHECK_VALUE(sizes_of<Int>(*weight_index)[0] == read, op,
                      "(): expected `weight_index` to have one entry for each of the ", read,
                      " channels that are read, got ", sizes_of<Int>(*weight_index), ".");
  } else if (groups != 1) {
    s.depthwise = groups == s.channels_in && s.channels_out == s.channels_in && w[1] == 1;
    TORCH_CHECK_NOT_IMPLEMENTED(
        s.depthwise, op, "(): expected `groups` to be 1, or C_in with C_out == C_in (depthwise), got groups=", groups,
        " with C_in=", s.channels_in, " and C_out=", s.channels_out, ". Hint: keep torch.nn.Conv2d for this layer.");
  } else {
    TORCH_CHECK_VALUE(w[1] == s.channels_in, op, "(): expected `weight` to have the input's C_in=", s.channels_in,
                      " channels in dimension 1, got ", w[1],
                      ". Hint: weight is full-size; lists and switches select from it. After a layer that writes "
                      "listed channels only, swap_(model, layer_type=MaskedConv2d) keeps the full width.");
  }
  if (has_value(bias)) {
    TORCH_CHECK_TYPE(bias->scalar_type() == dtype, op, "(): expected `bias` to have the input's dtype ", dtype,
                     ", got ", bias->scalar_type(), ".");
    TORCH_CHECK_VALUE(bias->device() == input.device(), op, "(): expected `bias` to be on the input's device ",
                      input.device(), ", got ", bias->device(), ".");
    TORCH_CHECK_VALUE(bias->dim() == 1 && sizes_of<Int>(*bias)[0] == s.channels_out, op,
                      "(): expected `bias` to have the shape (C_out,) = (", s.channels_out, ",), got ",
                      sizes_of<Int>(*bias), ". Hint: bias is full-size; lists select from it.");
  }
  if (has_value(in_index)) s.kept_in = sizes_of<Int>(*in_index)[0];
  if (has_value(out_index)) s.kept_out = sizes_of<Int>(*out_index)[0];
  if (s.depthwise) {
    TORCH_CHECK_VALUE(has_value(in_index) == has_value(out_index) && s.kept_in == s.kept_out, op,
                      "(): expected `in_index` to equal `out_index` for a depthwise convolution, got ",
                      has_value(in_index) ? "a list" : "None", " of ", s.kept_in, " and ",
                      has_value(out_index) ? "a list" : "None", " of ", s.kept_out, " channels.");
  }
  s.out_h = out_length<Int>(s.height, padding[kTop] + padding[kBottom], s.kernel_h, dilation[0], stride[0]);
  s.out_w = out_length<Int>(s.width, padding[kLeft] + padding[kRight], s.kernel_w, dilation[1], stride[1]);
  const bool fits = s.height + padding[kTop] + padding[kBottom] >= dilation[0] * (s.kernel_h - 1) + 1 &&
                    s.width + padding[kLeft] + padding[kRight] >= dilation[1] * (s.kernel_w - 1) + 1;
  TORCH_CHECK_VALUE(fits, op,
                    "(): expected `input` with its padding to be at least as large as the dilated kernel, got input ",
                    s.height, " x ", s.width, ", padding ", padding, ", kernel ", s.kernel_h, " x ", s.kernel_w,
                    ", dilation ", dilation, ".");
  return s;
}

template ConvShape<int64_t> check_conv(const char*, const ConvArgs<int64_t>&, const OptionalTensor&);
template ConvShape<c10::SymInt> check_conv(const char*, const ConvArgs<c10::SymInt>&, const OptionalTensor&);

void check_list_values(const char* op, const OptionalTensor& in_index, const OptionalTensor& out_index,
                       int64_t channels_in, int64_t channels_out, bool depthwise) {
  check_list_values(op, "in_index", in_index, channels_in);
  check_list_values(op, "out_index", out_index, channels_out);
  if (depthwise && has_value(in_index) && in_index->is_cpu()) {
    TORCH_CHECK_VALUE(in_index->equal(*out_index), op,
                      "(): expected `in_index` to equal `out_index` for a depthwise convolution, got different lists.");
  }
}

void check_list_values(const char* op, const char* name, const OptionalTensor& list, int64_t channels) {
  if (has_value(list) && list->is_cpu()) check_range_and_repeats(op, name, *list, channels);
}

namespace {

void check_channel_vector(const char* op, const char* name, const OptionalTensor& vector, const c10::SymInt& length,
                          const at::Tensor& input) {
  if (!has_value(vector)) return;
  TORCH_CHECK_TYPE(vector->scalar_type() == at::kFloat || vector->scalar_type() == input.scalar_type(), op,
                   "(): expected `", name, "` to be float32 or to have the input's dtype, got ", vector->scalar_type(),
                   ".");
  TORCH_CHECK_VALUE(vector->device() == input.device(), op, "(): expected `", name, "` to be on the input's device ",
                    input.device(), ", got ", vector->device(), ".");
  TORCH_CHECK_VALUE(vector->dim() == 1 && vector->sym_size(0) == length, op, "(): expected `", name,
                    "` to have one entry for each of the ", length, " listed channels, got ", vector->sym_sizes(), ".");
}

template <class Int>
void check_like_result(const char* op, const char* name, const at::Tensor& t, const ConvShape<Int>& s,
                       const at::Tensor& input) {
  TORCH_CHECK_TYPE(t.scalar_type() == input.scalar_type(), op, "(): expected `", name, "` to have the input's dtype ",
                   input.scalar_type(), ", got ", t.scalar_type(), ".");
  TORCH_CHECK_VALUE(t.device() == input.device(), op, "(): expected `", name, "` to be on the input's device ",
                    input.device(), ", got ", t.device(), ".");
  const std::array<Int, 4> shape = {s.batch, s.kept_out, s.out_h, s.out_w};
  TORCH_CHECK_VALUE(sizes_of<Int>(t).equals(shape), op, "(): expected `", name, "` to have the result's shape ",
                    c10::ArrayRef<Int>(shape), ", got ", sizes_of<Int>(t), ".");
}

}  // namespace

template <class Int>
ConvShape<Int> check_gathered_conv2d_fused(const char* op, const GatheredConv2dFusedArgs<Int>& args) {
  const auto s = check_conv<Int>(op, args, args.weight_index);
  const Fusion& fusion = args.fusion;
  check_channel_vector(op, "in_scale", fusion.in_scale, s.kept_in, args.input);
  check_channel_vector(op, "in_shift", fusion.in_shift, s.kept_in, args.input);
  check_channel_vector(op, "out_scale", fusion.out_scale, s.kept_out, args.input);
  check_channel_vector(op, "out_shift", fusion.out_shift, s.kept_out, args.input);
  if (has_value(fusion.residual)) check_like_result(op, "residual", *fusion.residual, s, args.input);
  check_list(op, "dual_store_index", args.dual_store_index, args.input);
  if (args.out_max.has_value()) {
    TORCH_CHECK_VALUE(fusion.out_relu, op,
                      "(): expected `out_max` only with out_relu=True, got out_max=", *args.out_max,
                      " with out_relu=False.");
    TORCH_CHECK_VALUE(*args.out_max > 0, op, "(): expected `out_max` to be above 0, got ", *args.out_max, ".");
  }
  return s;
}

template ConvShape<int64_t> check_gathered_conv2d_fused(const char*, const GatheredConv2dFusedArgs<int64_t>&);
template ConvShape<c10::SymInt> check_gathered_conv2d_fused(const char*, const GatheredConv2dFusedArgs<c10::SymInt>&);

template <class Int>
void check_grad_output(const char* op, const at::Tensor& grad_output, const ConvShape<Int>& s,
                       const at::Tensor& input) {
  check_like_result(op, "grad_output", grad_output, s, input);
}

template void check_grad_output(const char*, const at::Tensor&, const ConvShape<int64_t>&, const at::Tensor&);
template void check_grad_output(const char*, const at::Tensor&, const ConvShape<c10::SymInt>&, const at::Tensor&);

}  // namespace bap_kernels
