// Callers of the private ops of bap_kernels._C_cuda.
#include "backends/cuda/launches.h"

#include <ATen/Context.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <string>

namespace bap_kernels {
namespace {

template <class Schema>
auto typed_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Schema>();
}

// The user's wish for float32 convolutions, by its older or its newer name.
bool tf32_allowed(const at::Tensor& t) {
  return t.scalar_type() == at::kFloat && at::globalContext().allowTF32CuDNN(at::Float32Op::CONV);
}

OptionalTensor dense(const OptionalTensor& vector) {
  return has_value(vector) ? OptionalTensor(vector->contiguous()) : std::nullopt;
}

// Runs as the private ops take them, kMaxRuns at a time.
struct LaunchRuns {
  std::vector<at::Tensor> weights, lists;
  std::vector<int64_t> integers;
};

template <class Body>
void for_launches(const at::Tensor& source, const std::vector<LaunchRun>& runs, Body body) {
  for (size_t first = 0; first < runs.size(); first += kMaxRuns) {
    LaunchRuns part;
    for (size_t i = first; i < std::min(runs.size(), first + kMaxRuns); ++i) {
      const LaunchRun& run = runs[i];
      if (run.weight.defined()) part.weights.push_back(run.weight);
      // Where there is no list any tensor holds its place.
      part.lists.push_back(has_value(run.list.entries) ? *run.list.entries : source);
      const RunOptions options{run.list.block, run.list.length, run.first, run.images};
      for (const int64_t integer : list_of(options)) part.integers.push_back(integer);
    }
    body(part);
  }
}

int64_t rounded_up(int64_t length) { return (length + kPackedAlignment - 1) / kPackedAlignment * kPackedAlignment; }

// A compact NHWC tensor (N, channels rounded up, H, W) for a tensor (N, C, H, W).
at::Tensor new_copy(const at::Tensor& t, int64_t channels) {
  return at::empty({t.size(0), t.size(2), t.size(3), rounded_up(channels)}, t.options().memory_format(std::nullopt))
      .permute({0, 3, 1, 2});
}

}  // namespace

void launch_conv(const ConvLaunch& l) {
  using T = const at::Tensor&;
  using O = const OptionalTensor&;
  static auto op = typed_op<void(O, T, at::TensorList, at::TensorList, c10::IntArrayRef, O, O, O, O, O, O, O, O, O, O,
                                 O, O, O, c10::IntArrayRef)>("bap_kernels::_gathered_conv2d_cuda");
  const ConvOptions options{l.h,
                            l.w,
                            l.result_list.block,
                            l.columns,
                            static_cast<int64_t>(l.route),
                            l.gradient,
                            l.full_width,
                            l.relu,
                            tf32_allowed(l.source),
                            l.reduce_off,
                            l.source_relu};
  const OptionalTensor bias = dense(l.bias), scale = dense(l.scale), shift = dense(l.shift);
  const OptionalTensor source_scale = dense(l.source_scale), source_shift = dense(l.source_shift);
  const OptionalTensor copy = l.copy != nullptr ? OptionalTensor(*l.copy) : std::nullopt;
  for_launches(l.source, l.runs, [&](const LaunchRuns& runs) {
    op.call(l.result, l.source, runs.weights, runs.lists, runs.integers, l.result_list.entries, bias, scale, shift,
            l.residual, l.depth, l.stored, l.input, l.grad_switch, source_scale, source_shift, copy, l.copy_list,
            list_of(options));
  });
}

void launch_weight_gradient(const at::Tensor& result, const at::Tensor& grad, const at::Tensor& source,
                            const ListForm& source_list, const ListForm& rows, const ListForm& columns,
                            const OptionalTensor& used, const AxisOptions& h, const AxisOptions& w) {
  using T = const at::Tensor&;
  using O = const OptionalTensor&;
  static auto op = typed_op<void(T, T, T, O, O, O, O, c10::IntArrayRef)>("bap_kernels::_weight_gradient_cuda");
  const WeightGradientOptions options{
      h, w, source_list.block, rows.block, columns.block, rows.length, columns.length, tf32_allowed(source)};
  op.call(result, grad, source, source_list.entries, rows.entries, columns.entries, used, list_of(options));
}

at::Tensor packed_channels(const at::Tensor& source, const std::vector<LaunchRun>& runs, const OptionalTensor& used,
                           const Fusion& prologue) {
  using T = const at::Tensor&;
  using O = const OptionalTensor&;
  static auto op = typed_op<void(T, T, at::TensorList, c10::IntArrayRef, O, O, O, c10::IntArrayRef)>(
      "bap_kernels::_channel_pack_cuda");
  int64_t length = 1;
  for (const LaunchRun& run : runs) length = std::max(length, run.list.length);
  const at::Tensor copy = new_copy(source, length);
  const PackOptions options{prologue.in_relu};
  for_launches(source, runs, [&](const LaunchRuns& part) {
    op.call(copy.permute({0, 2, 3, 1}), source, part.lists, part.integers, used, dense(prologue.in_scale),
            dense(prologue.in_shift), list_of(options));
  });
  return copy;
}

at::Tensor packed_channels(const at::Tensor& source, const ListForm& list, const OptionalTensor& used) {
  return packed_channels(source, {LaunchRun{{}, list, 0, source.size(0)}}, used, {});
}

void unpack_channels(const at::Tensor& result, const at::Tensor& copy, const ListForm& list,
                     const OptionalTensor& used) {
  using T = const at::Tensor&;
  using O = const OptionalTensor&;
  static auto op = typed_op<void(T, T, O, O, c10::IntArrayRef)>("bap_kernels::_channel_unpack_cuda");
  const UnpackOptions options{list.block, list.length};
  op.call(result, copy.permute({0, 2, 3, 1}), list.entries, used, list_of(options));
}

void launch_conv_into_result(ConvLaunch l) {
  if (!has_value(l.result)) return launch_conv(l);
  const at::Tensor result = *l.result;
  const bool planes = result.stride(3) == 1 && result.stride(1) != 1;
  if (l.route != ConvRoute::kRows || !planes) {
    if (l.full_width) result.zero_();
    if (l.copy != nullptr) {
      *l.copy = at::empty({result.size(0), l.copy_list->size(0), result.size(2), result.size(3)},
                          result.options().memory_format(l.copy_format));
    }
    return launch_conv(l);
  }
  // It would be single elements of planes, too: selected afterwards.
  l.copy_list.reset();
  l.copy = nullptr;
  const ListForm list = l.full_width ? l.result_list : ListForm{std::nullopt, 0, l.columns};
  const at::Tensor copy = new_copy(result, l.columns);
  l.result = copy;
  l.full_width = false;
  launch_conv(l);
  unpack_channels(result, copy, list, l.stored);
}

at::Tensor packed_weight(const at::Tensor& weight, const OptionalTensor& rows, const OptionalTensor& columns,
                         bool by_input) {
  at::Tensor w = has_value(rows) ? weight.index_select(0, *rows) : weight;
  if (has_value(columns)) w = w.index_select(1, *columns);
  w = by_input ? w.permute({1, 2, 3, 0}) : w.permute({0, 2, 3, 1});
  const int64_t length = w.size(3), taps = w.size(1) * w.size(2);
  const at::Tensor packed =
      at::zeros({w.size(0), w.size(1), w.size(2), rounded_up(length)}, w.options().memory_format(std::nullopt));
  packed.narrow(3, 0, length).copy_(w);
  return packed.view({w.size(0), taps, packed.size(3)});
}

bool capturing_cuda(const at::Tensor& t) {
  static auto op = typed_op<bool(const at::Tensor&)>("bap_kernels::_capturing_cuda");
  return op.call(t);
}

bool aligned_chunks(const at::Tensor& t, bool planes) {
  const int64_t vector = 16 / static_cast<int64_t>(t.element_size());
  if (reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 != 0) return false;
  for (int64_t d = 0; d < 4; ++d) {
    const bool inner = planes ? d >= 2 : d == 1;
    if (!inner && t.size(d) > 1 && t.stride(d) % vector != 0) return false;
  }
  if (!planes) return t.stride(1) == 1;
  return t.stride(3) == 1 && (t.size(2) == 1 || t.stride(2) == t.size(3));
}

void refuse_uncovered(const char* op, const at::Tensor& input, const at::Tensor& weight, int64_t groups, int64_t out_h,
                      int64_t out_w) {
  std::string reason;
  const auto dtype = input.scalar_type();
  const int64_t pixels = input.size(0) * std::max(input.size(2) * input.size(3), out_h * out_w);
  if (dtype != at::kFloat && dtype != at::kHalf && dtype != at::kBFloat16) {
    reason = std::string("no CUDA kernel for ") + c10::toString(dtype) + " (float32, float16 and bfloat16 only)";
  } else if (groups != 1) {
    reason = "no CUDA kernel for depthwise convolutions";
  } else if (input.size(0) >= 65536) {
    reason = "a batch of more than 65535 images";
  } else if (pixels >= int64_t{1} << 30 || weight.numel() >= int64_t{1} << 30) {
    reason = "the shape is beyond 32-bit tile arithmetic";
  } else {
    const auto conv = c10::Dispatcher::singleton().findSchema({"bap_kernels::_gathered_conv2d_cuda", ""});
    const auto key = input.is_cuda() ? c10::DispatchKey::CUDA : c10::DispatchKey::CPU;
    if (!conv.has_value()) {
      reason = "bap_kernels._C_cuda is not loaded";
    } else if (!conv->hasKernelForDispatchKey(key)) {
      reason = "it does not compute on the tensors' device, " + input.device().str();
    }
  }
  TORCH_CHECK_NOT_IMPLEMENTED(reason.empty(), op,
                              "(): expected a call that backend `cuda` can run, got one that it cannot: ", reason,
                              ". Hint: use_backend(\"auto\") takes the ATen path where CUDA cannot run.");
}

std::array<AxisOptions, 2> axes_of(const at::Tensor& input, const at::Tensor& weight, int64_t out_h, int64_t out_w,
                                   c10::IntArrayRef stride, c10::IntArrayRef padding, c10::IntArrayRef dilation) {
  return {{{input.size(2), out_h, weight.size(2), stride[0], padding[kTop], dilation[0]},
           {input.size(3), out_w, weight.size(3), stride[1], padding[kLeft], dilation[1]}}};
}

bool pointwise(const std::array<AxisOptions, 2>& axes) {
  return std::all_of(axes.begin(), axes.end(), [](const AxisOptions& a) {
    return a.kernel == 1 && a.stride == 1 && a.before == 0 && a.input == a.output;
  });
}

}  // namespace bap_kernels
