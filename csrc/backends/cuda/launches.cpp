// From tensors to the parameters of the kernels, and the launches.
#include "backends/cuda/launches.h"

#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <string>

#include "backends/cuda/plan.h"
#include "dispatch/verdicts.h"

namespace bap_kernels {
namespace {

const CudaLauncher* known_launcher = nullptr;

const CudaLauncher& launcher() {
  TORCH_INTERNAL_ASSERT(known_launcher != nullptr);
  return *known_launcher;
}

void* current_stream(const at::Tensor& t) {
  if (!t.is_cuda()) return nullptr;
  return c10::impl::VirtualGuardImpl(t.device().type()).getStream(t.device()).native_handle();
}

// Makes the tensors' device current as long as it lives, and knows its current stream.
struct OnDevice {
  explicit OnDevice(const at::Tensor& t)
      : guard(t.is_cuda() ? std::optional(t.device()) : std::nullopt),
        stream(current_stream(t)),
        index(t.is_cuda() ? t.get_device() : 0) {}
  c10::OptionalDeviceGuard guard;
  void* stream;
  int index;
};

std::string shape_text(const at::Tensor& t) {
  std::string text = "(";
  for (const int64_t size : t.sizes()) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + ")";
}

void check_launch(Status status, const char* kernel, const at::Tensor& source, const at::Tensor& other) {
  TORCH_CHECK(status == 0, "the CUDA kernel ", kernel, " did not launch for shapes ", shape_text(source), " and ",
              shape_text(other), ": ", launcher().status_text(status), ".");
}

MathMode products_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kBFloat16:
      return MathMode::kBFloat16;
    case at::kHalf:
      return MathMode::kHalf;
    default:
      return MathMode::kTf32;
  }
}

Strides strides_of(const at::Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}; }

// The same of a tensor whose chunks are copied. Addresses outside of it are computed, too, which nothing is read from
// but which have to be aligned: along an axis of one place a tensor may have any stride, and needs none.
Strides copied_strides(const at::Tensor& t) {
  const auto along = [&t](int64_t d) { return t.size(d) == 1 ? 0 : t.stride(d); };
  return {along(0), along(1), along(2), along(3)};
}

ListParams list_params(const ListForm& list) {
  if (!has_value(list.entries)) return {nullptr, 0, 0};
  int shift = 0;
  while (int64_t{1} << shift < list.block) ++shift;
  TORCH_INTERNAL_ASSERT(int64_t{1} << shift == list.block);
  return {list.entries->const_data_ptr<int32_t>(), static_cast<int>(list.block), shift};
}

VectorParams vector_params(const OptionalTensor& t) {
  if (!has_value(t)) return {nullptr, false};
  return {t->const_data_ptr(), t->scalar_type() == at::kFloat};
}

const int32_t* count_pointer(const OptionalTensor& t) { return has_value(t) ? t->const_data_ptr<int32_t>() : nullptr; }

OptionalTensor dense(const OptionalTensor& vector) {
  return has_value(vector) ? OptionalTensor(vector->contiguous()) : std::nullopt;
}

at::Tensor new_floats(at::IntArrayRef sizes, const at::Tensor& like) {
  return at::empty(sizes, like.options().dtype(at::kFloat));
}

// Calls `body` with the runs of each launch and their number of images.
template <class Body>
void for_launches(const std::vector<LaunchRun>& runs, Body body) {
  for_chunks(runs, [&](size_t first, size_t last, int images) {
    Runs part{};
    for (size_t i = first; i < last; ++i) {
      const LaunchRun& run = runs[i];
      BatchRun& to = part.of[part.count++];
      if (run.weight.defined()) {
        to.weight = run.weight.const_data_ptr();
        to.stride_weight_column = run.weight.stride(0);
        to.stride_weight_tap = run.weight.stride(1);
      }
      to.list = list_params(run.list);
      to.depth = static_cast<int>(run.list.length);
      to.first = static_cast<int>(run.first);
      to.images = static_cast<int>(run.images);
    }
    body(part, images);
  });
}

// A compact NHWC tensor (N, channels rounded up, H, W) for a tensor (N, C, H, W).
at::Tensor new_copy(const at::Tensor& t, int64_t channels) {
  return at::empty({t.size(0), t.size(2), t.size(3), packed_length(channels)}, t.options().memory_format(std::nullopt))
      .permute({0, 3, 1, 2});
}

// Adds the rows of `partial` (terms, columns) into the places of `result` that the list names.
void sum_terms(const at::Tensor& partial, const at::Tensor& result, const ListParams& list, const int32_t* used,
               MathMode mode, const OnDevice& on) {
  SumPartialsParams p{};
  p.partial = partial.const_data_ptr<float>();
  p.result = result.mutable_data_ptr();
  p.stride_chunk = partial.size(1);
  p.result_stride = {0, result.stride(0), 0, 0};
  p.column_list = list;
  p.used = used;
  p.chunks = static_cast<int>(partial.size(0));
  p.rows = p.taps = p.kernel_w = 1;
  p.columns = static_cast<int>(partial.size(1));
  p.result_is_float = result.scalar_type() == at::kFloat;
  check_launch(launcher().sum_partials(p, mode, on.stream), "sum_partials", partial, result);
}

int row_tile(TileShape tile) {
  return tile == TileShape::kSmall ? SmallTile::kRows : tile == TileShape::kLarge ? LargeTile::kRows : ThinTile::kRows;
}

// The forward with a halo, of filled-in parameters.
void launch_halo(const ConvParams& conv, const ConvLaunch& l, MathMode mode, const OnDevice& on) {
  HaloParams p{};
  p.conv = conv;
  p.planes = l.source.stride(3) == 1;
  p.planar_result = l.result->stride(3) == 1;
  p.prologue = conv.source_scale.values != nullptr || conv.source_shift.values != nullptr || conv.source_relu;
  // Where 16 bytes of a plane's row start is seen row by row.
  if (p.planar_result) {
    p.conv.result_vector = reinterpret_cast<uintptr_t>(conv.result) % kChunkBytes == 0;
    const Strides& copy = conv.copy_stride;
    p.conv.copy_vector =
        reinterpret_cast<uintptr_t>(conv.copy) % kChunkBytes == 0 && copy.w == 1 && copy.h == l.result->size(3);
  }
  const auto element_bytes = static_cast<int>(l.source.element_size());
  const HaloChoice choice = choose_halo(halo_case(conv, reinterpret_cast<uintptr_t>(conv.source), element_bytes),
                                        launcher().sm_count(on.index));
  TORCH_INTERNAL_ASSERT(choice.fits && !conv.gradient && !conv.full_width);
  p.shape = choice.shape;
  check_launch(launcher().halo_conv2d(p, mode, choice.tile, choice.shared_bytes, on.stream), "halo_conv2d", l.source,
               l.runs[0].weight);
}

// Calls `body` with the phases of each launch filled in; the forward has one.
template <class Body>
void for_phases(ConvParams p, Body body) {
  const int all_h = p.gradient ? p.axis_h.stride : 1, all_w = p.gradient ? p.axis_w.stride : 1;
  const auto axis = [&p](const ConvAxis& a, int phase) {
    return p.gradient ? gradient_axis(a, phase) : forward_axis(a);
  };
  for (p.first_phase_h = 0; p.first_phase_h < all_h; p.first_phase_h += kMaxPhases) {
    p.phases_h = std::min(all_h - p.first_phase_h, kMaxPhases);
    for (int i = 0; i < p.phases_h; ++i) p.plans_h[i] = axis(p.axis_h, p.first_phase_h + i);
    for (p.first_phase_w = 0; p.first_phase_w < all_w; p.first_phase_w += kMaxPhases) {
      p.phases_w = std::min(all_w - p.first_phase_w, kMaxPhases);
      for (int i = 0; i < p.phases_w; ++i) p.plans_w[i] = axis(p.axis_w, p.first_phase_w + i);
      body(p);
    }
  }
}

// Room for a sum's parts.
at::Tensor new_parts(PartialSums& parts, int count, int64_t grids, int64_t pixels, int64_t columns,
                     const at::Tensor& like) {
  const at::Tensor sums = new_floats({count, grids, pixels, (columns + 3) / 4 * 4}, like);
  parts.sums = sums.mutable_data_ptr<float>();
  parts.stride_part = sums.stride(0);
  parts.stride_phase = sums.stride(1);
  parts.stride_row = static_cast<int>(sums.stride(2));
  return sums;
}

// One launch, or one for each kMaxPhases phases, of parameters that lack what depends on tile and phase; two where sums
// are cut into parts.
void launch_gemm(ConvParams p, const ConvLaunch& l, MathMode mode, const OnDevice& on) {
  const bool planes = l.route == ConvRoute::kPlanes, reduced = has_value(l.grad_switch);
  const GemmChoice choice = choose_gemm(l, p.batch);
  const at::Tensor& weight = l.runs[0].weight;
  p.parts.count = divisor_of(choice.parts);
  at::Tensor parts, partial;
  if (choice.parts > 1) {
    const int64_t pixels = l.source.size(0) * p.pixels;
    parts = new_parts(p.parts, choice.parts, choice.grids, pixels, p.columns, l.source);
  }
  if (reduced) {
    const int tile = choice.parts > 1 ? SplitEpilogueTile::kRows : row_tile(choice.tile);
    partial = new_floats({choice.grids * tiles_of(choice.rows, tile), p.columns}, l.source);
    p.partial = partial.mutable_data_ptr<float>();
    p.input = l.input->const_data_ptr();
    p.input_stride = strides_of(*l.input);
    p.reduce_off = l.reduce_off;
  }
  for_phases(p, [&](const ConvParams& phases) {
    const auto check = [&](Status status, const char* kernel) { check_launch(status, kernel, l.source, weight); };
    if (choice.warpgroups) {
      check(launcher().warpgroup_conv2d(phases, mode, choice.warpgroup_tile, on.stream), "warpgroup_conv2d");
    } else {
      check(launcher().gathered_conv2d(phases, mode, choice.tile, planes, on.stream), "gathered_conv2d");
    }
    if (choice.parts > 1) check(launcher().split_epilogue(phases, mode, on.stream), "split_epilogue");
  });
  if (reduced) sum_terms(partial, *l.grad_switch, p.result_list, p.reduce_off ? nullptr : p.stored, mode, on);
}

}  // namespace

const CudaLauncher* cuda_launcher() { return known_launcher; }

void set_cuda_launcher(const CudaLauncher* given) {
  TORCH_CHECK(given->layout == kLauncherLayout, "bap_kernels._C_cuda was built from other sources than bap_kernels._C");
  known_launcher = given;
}

void for_chunks(const std::vector<LaunchRun>& runs, c10::function_ref<void(size_t, size_t, int)> body) {
  for (size_t first = 0; first < runs.size(); first += kMaxRuns) {
    const size_t last = std::min(runs.size(), first + kMaxRuns);
    int64_t images = 0;
    for (size_t i = first; i < last; ++i) images += runs[i].images;
    body(first, last, static_cast<int>(images));
  }
}

DeviceFacts device_facts(const at::Tensor& t) {
  const OnDevice on(t);
  return {launcher().sm_count(on.index), launcher().has_warpgroups(on.index)};
}

void launch_conv(const ConvLaunch& l) {
  const MathMode mode = products_of(l.source);
  const bool planes = l.route == ConvRoute::kPlanes, halo = l.route == ConvRoute::kHalo;
  TORCH_INTERNAL_ASSERT(halo || aligned_chunks(l.source, planes));
  const OnDevice on(l.source);
  const OptionalTensor bias = dense(l.bias), scale = dense(l.scale), shift = dense(l.shift);
  const OptionalTensor source_scale = dense(l.source_scale), source_shift = dense(l.source_shift);
  ConvParams p{};
  p.source = l.source.const_data_ptr();
  p.source_stride = halo ? strides_of(l.source) : copied_strides(l.source);
  p.result_list = list_params(l.result_list);
  p.full_width = l.full_width;
  p.depth = count_pointer(l.depth);
  p.stored = count_pointer(l.stored);
  p.columns = static_cast<int>(l.columns);
  p.gradient = l.gradient;
  p.axis_h = l.h;
  p.axis_w = l.w;
  p.kernel_w = p.axis_w.kernel;
  p.pixels = p.gradient ? ceil_div(l.h.input, l.h.stride) * ceil_div(l.w.input, l.w.stride) : l.h.output * l.w.output;
  p.bias = vector_params(bias);
  p.scale = vector_params(scale);
  p.shift = vector_params(shift);
  p.relu = l.relu;
  p.source_scale = vector_params(source_scale);
  p.source_shift = vector_params(source_shift);
  p.source_relu = l.source_relu;
  if (has_value(l.residual)) {
    p.residual = l.residual->const_data_ptr();
    p.residual_stride = strides_of(*l.residual);
    p.residual_vector = aligned_chunks(*l.residual, false);
  }
  if (has_value(l.result)) {
    p.result = l.result->mutable_data_ptr();
    p.result_stride = strides_of(*l.result);
    const int64_t vector = kChunkBytes / static_cast<int64_t>(l.source.element_size());
    // Listed columns stand side by side where the list consists of blocks.
    const bool together = planes || !p.full_width || p.result_list.block % vector == 0;
    p.result_vector = together && aligned_chunks(*l.result, planes);
  }
  if (l.copy != nullptr) {
    TORCH_INTERNAL_ASSERT(has_value(l.copy_list) && l.copy->size(1) == l.copy_list->size(0) && has_value(l.result) &&
                          !p.gradient && !p.full_width);
    p.copy = l.copy->mutable_data_ptr();
    p.copy_stride = strides_of(*l.copy);
    p.copy_list = l.copy_list->const_data_ptr<int32_t>();
    p.copied = static_cast<int>(l.copy_list->size(0));
    p.copy_vector = aligned_chunks(*l.copy, planes);
  }
  for_launches(l.runs, [&](const Runs& runs, int images) {
    p.runs = runs;
    p.batch = images;
    halo ? launch_halo(p, l, mode, on) : launch_gemm(p, l, mode, on);
  });
}

void launch_weight_gradient(const at::Tensor& result, const at::Tensor& grad, const at::Tensor& source,
                            const ListForm& source_list, const ListForm& rows, const ListForm& columns,
                            const OptionalTensor& used, const ConvAxis& h, const ConvAxis& w) {
  TORCH_INTERNAL_ASSERT(aligned_chunks(source, false) && aligned_chunks(grad, false));
  const MathMode mode = products_of(source);
  const OnDevice on(source);
  WeightGradientParams p{};
  p.grad = grad.const_data_ptr();
  p.source = source.const_data_ptr();
  p.grad_stride = copied_strides(grad);
  p.source_stride = copied_strides(source);
  p.source_list = list_params(source_list);
  p.used = count_pointer(used);
  p.batch = static_cast<int>(source.size(0));
  p.rows = static_cast<int>(rows.length);
  p.columns = static_cast<int>(columns.length);
  p.axis_h = h;
  p.axis_w = w;

  const auto [tile, warpgroups] = choose_weight_gradient(source, p.rows, p.columns);
  const bool large = tile == TileShape::kLarge;
  const int taps = h.kernel * w.kernel;
  const int64_t tiles = int64_t{taps} * ceil_div(p.rows, large ? LargeTile::kRows : SmallTile::kRows) *
                        ceil_div(p.columns, large ? LargeTile::kColumns : SmallTile::kColumns);
  const int64_t pixels = int64_t{p.batch} * h.output * w.output;
  const int64_t depth = kDepthBytes / static_cast<int64_t>(source.element_size());
  // Two waves of blocks at most, and at least four steps for each block.
  const int64_t most = std::max<int64_t>(1, std::min(2 * launcher().sm_count(on.index) / tiles, pixels / (4 * depth)));
  p.pixels_per_chunk = static_cast<int>((pixels + most * depth - 1) / (most * depth) * depth);
  const int64_t chunks = (pixels + p.pixels_per_chunk - 1) / p.pixels_per_chunk;
  const at::Tensor partial = new_floats({chunks, p.rows, taps, p.columns}, source);
  p.partial = partial.mutable_data_ptr<float>();
  if (warpgroups) {
    check_launch(launcher().warpgroup_weight_gradient(p, mode, on.stream), "warpgroup_weight_gradient", grad, source);
  } else {
    check_launch(launcher().weight_gradient(p, mode, tile, on.stream), "weight_gradient", grad, source);
  }

  SumPartialsParams s{};
  s.partial = p.partial;
  s.result = result.mutable_data_ptr();
  s.stride_chunk = partial.stride(0);
  s.stride_row = partial.stride(1);
  s.stride_tap = partial.stride(2);
  s.result_stride = strides_of(result);
  s.row_list = list_params(rows);
  s.column_list = list_params(columns);
  s.used = p.used;
  s.chunks = static_cast<int>(chunks);
  s.rows = p.rows;
  s.taps = taps;
  s.kernel_w = w.kernel;
  s.columns = p.columns;
  s.result_is_float = result.scalar_type() == at::kFloat;
  check_launch(launcher().sum_partials(s, mode, on.stream), "sum_partials", partial, result);
}

at::Tensor packed_channels(const at::Tensor& source, const std::vector<LaunchRun>& runs, const OptionalTensor& used,
                           const Fusion& prologue) {
  int64_t length = 1;
  for (const LaunchRun& run : runs) length = std::max(length, run.list.length);
  const at::Tensor copy = new_copy(source, length);
  const OptionalTensor scale = dense(prologue.in_scale), shift = dense(prologue.in_shift);
  const OnDevice on(source);
  ChannelPackParams p{};
  p.source = source.const_data_ptr();
  p.result = copy.mutable_data_ptr();
  p.source_stride = strides_of(source);
  p.used = count_pointer(used);
  p.height = static_cast<int>(source.size(2));
  p.width = divisor_of(static_cast<int>(source.size(3)));
  p.padded = static_cast<int>(copy.size(1));
  const int64_t vector = kChunkBytes / static_cast<int64_t>(source.element_size());
  p.channel_vector = aligned_chunks(source, false) && std::all_of(runs.begin(), runs.end(), [&](const LaunchRun& run) {
                       return run.list.block % vector == 0;
                     });
  p.pixel_vector = aligned_chunks(source, true) && source.size(2) * source.size(3) % vector == 0;
  p.scale = vector_params(scale);
  p.shift = vector_params(shift);
  p.relu = prologue.in_relu;
  for_launches(runs, [&](const Runs& part, int images) {
    p.runs = part;
    p.batch = images;
    check_launch(launcher().channel_pack(p, products_of(source), on.stream), "channel_pack", source, copy);
  });
  return copy;
}

at::Tensor packed_channels(const at::Tensor& source, const ListForm& list, const OptionalTensor& used) {
  return packed_channels(source, {LaunchRun{{}, list, 0, source.size(0)}}, used, {});
}

void unpack_channels(const at::Tensor& result, const at::Tensor& copy, const ListForm& list,
                     const OptionalTensor& used) {
  const OnDevice on(copy);
  ChannelUnpackParams p{};
  p.source = copy.const_data_ptr();
  p.result = result.mutable_data_ptr();
  p.result_stride = strides_of(result);
  p.list = list_params(list);
  p.depth = static_cast<int>(list.length);
  p.used = count_pointer(used);
  p.batch = static_cast<int>(result.size(0));
  p.channels = static_cast<int>(result.size(1));
  p.height = static_cast<int>(result.size(2));
  p.width = static_cast<int>(result.size(3));
  p.padded = static_cast<int>(copy.size(1));
  const int64_t vector = kChunkBytes / static_cast<int64_t>(result.element_size());
  p.result_vector = aligned_chunks(result, true) && result.size(2) * result.size(3) % vector == 0;
  check_launch(launcher().channel_unpack(p, products_of(copy), on.stream), "channel_unpack", copy, result);
}

void launch_conv_into_result(ConvLaunch l, bool spread) {
  if (!has_value(l.result)) return launch_conv(l);
  const at::Tensor result = *l.result;
  if (!spread) {
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

std::string uncovered_reason(const at::Tensor& input, const at::Tensor& weight, int64_t groups, int64_t out_h,
                             int64_t out_w) {
  const auto dtype = input.scalar_type();
  const int64_t pixels = input.size(0) * std::max(input.size(2) * input.size(3), out_h * out_w);
  if (dtype != at::kFloat && dtype != at::kHalf && dtype != at::kBFloat16) {
    return std::string("no CUDA kernel for ") + c10::toString(dtype) + " (float16, bfloat16, and float32 as TF32 only)";
  }
  // By the user's wish for float32 convolutions, under its older or its newer name.
  if (math_of(input) == FamilyMath::kFloat32) {
    return "no CUDA kernel for float32 unless torch.backends.cudnn.allow_tf32 lets convolutions round it to TF32";
  }
  if (groups != 1) return "no CUDA kernel for depthwise convolutions";
  // A bit for each in 32.
  if (weight.size(2) + weight.size(3) > 32) return "rows and columns of taps that add up to more than 32";
  if (input.size(0) >= 65536) return "a batch of more than 65535 images";
  if (pixels >= int64_t{1} << 30 || weight.numel() >= int64_t{1} << 30) {
    return "the shape is beyond 32-bit tile arithmetic";
  }
  if (known_launcher == nullptr) return "bap_kernels._C_cuda is not loaded";
  if (!(known_launcher->simulated ? input.is_cpu() : input.is_cuda())) {
    return "it does not compute on the tensors' device, " + input.device().str();
  }
  return "";
}

void refuse_uncovered(const char* op, const at::Tensor& input, const at::Tensor& weight, int64_t groups, int64_t out_h,
                      int64_t out_w) {
  const std::string reason = uncovered_reason(input, weight, groups, out_h, out_w);
  TORCH_CHECK_NOT_IMPLEMENTED(reason.empty(), op,
                              "(): expected a call that backend `cuda` can run, got one that it cannot: ", reason,
                              ". Hint: use_backend(\"auto\") takes the ATen path where CUDA cannot run.");
}

std::array<ConvAxis, 2> axes_of(const at::Tensor& input, const at::Tensor& weight, int64_t out_h, int64_t out_w,
                                c10::IntArrayRef stride, c10::IntArrayRef padding, c10::IntArrayRef dilation) {
  const auto axis = [&](int d, int64_t output, int64_t before) {
    return ConvAxis{static_cast<int>(input.size(2 + d)), static_cast<int>(output), static_cast<int>(weight.size(2 + d)),
                    static_cast<int>(stride[d]),         static_cast<int>(before), static_cast<int>(dilation[d])};
  };
  return {axis(0, out_h, padding[kTop]), axis(1, out_w, padding[kLeft])};
}

bool pointwise(const std::array<ConvAxis, 2>& axes) {
  return std::all_of(axes.begin(), axes.end(), [](const ConvAxis& a) {
    return a.kernel == 1 && a.stride == 1 && a.before == 0 && a.input == a.output;
  });
}

}  // namespace bap_kernels
