// Private ops of the CUDA backend over torch's stable ABI: one launch of the convolution, and of the compact copy.
// Their arguments come from csrc/backends/cuda/, which has checked them; the stable ABI carries a message but no
// exception type, so each error is a RuntimeError.
#include "backends/cuda/ops/tensors.h"

#if !defined(BAP_KERNELS_SIMULATED)
#include <cuda_runtime_api.h>
#endif

namespace bap_kernels {
namespace {

constexpr const char* kConv = "_gathered_conv2d_cuda";

// Adds the rows of `partial` (terms, columns) into the places of `result` that the list names.
void sum_terms(const Tensor& partial, const Tensor& result, const ListParams& list, const int32_t* used,
               Products products, const OnDevice& on) {
  SumPartialsParams p{};
  p.partial = static_cast<const float*>(partial.const_data_ptr());
  p.result = result.mutable_data_ptr();
  p.stride_chunk = partial.size(1);
  p.result_stride = {0, result.stride(0), 0, 0};
  p.column_list = list;
  p.used = used;
  p.chunks = static_cast<int>(partial.size(0));
  p.rows = p.taps = p.kernel_w = 1;
  p.columns = static_cast<int>(partial.size(1));
  p.result_is_float = result.scalar_type() == ScalarType::Float;
  check_launch(launch_sum_partials(p, products, on.stream()), kConv, "sum_partials", partial, result);
}

int images_of(const Runs& runs) {
  int images = 0;
  for (int run = 0; run < runs.count; ++run) images += runs.of[run].images;
  return images;
}

// The runs of a launch: `integers` are a RunOptions each; a list is not looked at where its block is 0. A compact copy
// has no weights.
Runs runs_of(const char* op, const std::vector<Tensor>& weights, const std::vector<Tensor>& lists,
             const std::vector<int64_t>& integers) {
  constexpr size_t kIntegers = sizeof(RunOptions) / 8;
  const size_t count = lists.size();
  STD_TORCH_CHECK(count > 0 && count <= kMaxRuns && integers.size() == count * kIntegers &&
                      (weights.empty() || weights.size() == count),
                  op, "(): expected 1 to ", kMaxRuns, " runs of ", kIntegers, " integers, got ", count, " lists and ",
                  integers.size(), " integers.");
  Runs runs{};
  runs.count = static_cast<int>(count);
  for (size_t i = 0; i < count; ++i) {
    RunOptions o;
    std::memcpy(&o, integers.data() + i * kIntegers, sizeof(o));
    BatchRun& run = runs.of[i];
    if (!weights.empty()) {
      run.weight = weights[i].const_data_ptr();
      run.stride_weight_column = weights[i].stride(0);
      run.stride_weight_tap = weights[i].stride(1);
    }
    if (o.block != 0) run.list = {static_cast<const int32_t*>(lists[i].const_data_ptr()), static_cast<int>(o.block)};
    run.depth = static_cast<int>(o.depth);
    run.first = static_cast<int>(o.first);
    run.images = static_cast<int>(o.images);
  }
  return runs;
}

int row_tile(TileShape tile) {
  return tile == TileShape::kSmall ? SmallTile::kRows : tile == TileShape::kLarge ? LargeTile::kRows : ThinTile::kRows;
}

// The forward with a halo, of filled-in parameters.
void launch_halo(const ConvParams& conv, const Tensor& source, const Tensor& weight, const OptionalStable& result,
                 Products products, const OnDevice& on) {
  STD_TORCH_CHECK(is_there(result) && !conv.gradient && !conv.full_width, kConv,
                  "(): expected a forward where the route is the halo.");
  HaloParams p{};
  p.conv = conv;
  p.planes = source.stride(3) == 1;
  p.planar_result = result->stride(3) == 1;
  p.prologue = conv.source_scale.values != nullptr || conv.source_shift.values != nullptr || conv.source_relu;
  // Where 16 bytes of a plane's row start is seen row by row.
  if (p.planar_result) {
    p.conv.result_vector = reinterpret_cast<uintptr_t>(conv.result) % kChunkBytes == 0;
    const Strides& copy = conv.copy_stride;
    p.conv.copy_vector =
        reinterpret_cast<uintptr_t>(conv.copy) % kChunkBytes == 0 && copy.w == 1 && copy.h == result->size(3);
  }
  const int element_bytes = static_cast<int>(source.element_size());
  const HaloChoice choice = choose_halo(halo_case(conv, reinterpret_cast<uintptr_t>(conv.source), element_bytes),
                                        processor_count(on.device()));
  STD_TORCH_CHECK(choice.fits, kConv, "(): expected a convolution whose halo fits into shared memory.");
  p.shape = choice.shape;
  check_launch(launch_halo_conv2d(p, products, choice.tile, choice.shared_bytes, on.stream()), kConv, "halo_conv2d",
               source, weight);
}

void conv(const OptionalStable& result, const Tensor& source, const std::vector<Tensor>& weights,
          const std::vector<Tensor>& lists, const std::vector<int64_t>& runs, const OptionalStable& result_list,
          const OptionalStable& bias, const OptionalStable& scale, const OptionalStable& shift,
          const OptionalStable& residual, const OptionalStable& depth, const OptionalStable& stored,
          const OptionalStable& input, const OptionalStable& grad_switch, const OptionalStable& source_scale,
          const OptionalStable& source_shift, const OptionalStable& copy, const OptionalStable& copy_list,
          const std::vector<int64_t>& list) {
  ConvOptions o;
  STD_TORCH_CHECK(options_of(list, o), kConv, "(): expected ", sizeof(o) / 8, " options, got ", list.size(), ".");
  const Products products = products_of(source, o.tf32 != 0, kConv);
  const auto route = static_cast<ConvRoute>(o.route);
  const bool planes = route == ConvRoute::kPlanes, halo = route == ConvRoute::kHalo;
  STD_TORCH_CHECK(halo || chunks_are_aligned(source, planes), kConv, "(): expected a source with aligned chunks.");
  const OnDevice on(source);

  ConvParams p{};
  p.source = source.const_data_ptr();
  p.source_stride = strides_of(source);
  p.runs = runs_of(kConv, weights, lists, runs);
  const Tensor& weight = weights[0];
  p.result_list = list_params(result_list, o.result_block);
  p.full_width = o.full_width != 0;
  p.depth = count_pointer(depth);
  p.stored = count_pointer(stored);
  p.batch = images_of(p.runs);
  p.columns = static_cast<int>(o.columns);
  p.gradient = o.gradient != 0;
  p.axis_h = o.h.axis();
  p.axis_w = o.w.axis();
  p.kernel_w = p.axis_w.kernel;
  p.phases_w = p.gradient ? p.axis_w.stride : 1;
  p.bias = vector_params(bias);
  p.scale = vector_params(scale);
  p.shift = vector_params(shift);
  p.relu = o.relu != 0;
  p.source_scale = vector_params(source_scale);
  p.source_shift = vector_params(source_shift);
  p.source_relu = o.source_relu != 0;
  if (is_there(residual)) {
    p.residual = residual->const_data_ptr();
    p.residual_stride = strides_of(*residual);
    p.residual_vector = chunks_are_aligned(*residual, false);
  }
  if (is_there(result)) {
    p.result = result->mutable_data_ptr();
    p.result_stride = strides_of(*result);
    const int64_t vector = kChunkBytes / static_cast<int64_t>(source.element_size());
    // Listed columns stand side by side where the list consists of blocks.
    const bool together = planes || !p.full_width || p.result_list.block % vector == 0;
    p.result_vector = together && chunks_are_aligned(*result, planes);
  }

  if (is_there(copy)) {
    STD_TORCH_CHECK(
        is_there(copy_list) && copy->size(1) == copy_list->size(0) && is_there(result) && !p.gradient && !p.full_width,
        kConv, "(): expected a copy of a forward's compact result, with its list.");
    p.copy = copy->mutable_data_ptr();
    p.copy_stride = strides_of(*copy);
    p.copy_list = static_cast<const int32_t*>(copy_list->const_data_ptr());
    p.copied = static_cast<int>(copy_list->size(0));
    p.copy_vector = chunks_are_aligned(*copy, planes);
  }

  if (halo) return launch_halo(p, source, weight, result, products, on);

  const auto along = [&](const ConvAxis& axis) {
    return static_cast<int64_t>(p.gradient ? ceil_div(axis.input, axis.stride) : axis.output);
  };
  const int64_t pixels = along(p.axis_h) * along(p.axis_w);
  const int64_t grids = planes ? p.batch : p.gradient ? p.axis_h.stride * p.axis_w.stride : 1;
  const int64_t rows = planes ? pixels : pixels * p.batch;
  const int processors = processor_count(on.device());
  const TileShape tile = choose_tile(rows, p.columns, grids, planes, processors);
  const bool words = products == Products::kBFloat16 || products == Products::kHalf;
  if (words && !planes && !is_there(grad_switch) && tile == TileShape::kLarge && has_warpgroups(on.device())) {
    const auto wide = choose_warpgroup_tile(rows, p.columns, grids, processors);
    return check_launch(launch_warpgroup_conv2d(p, products, wide, on.stream()), kConv, "warpgroup_conv2d", source,
                        weight);
  }

  Tensor partial;
  if (is_there(grad_switch)) {
    const int64_t terms = grids * ((rows + row_tile(tile) - 1) / row_tile(tile));
    partial = new_floats({terms, p.columns}, source);
    p.partial = static_cast<float*>(partial.mutable_data_ptr());
    p.input = input->const_data_ptr();
    p.input_stride = strides_of(*input);
    p.reduce_off = o.reduce_off != 0;
  }
  check_launch(launch_gathered_conv2d(p, products, tile, planes, on.stream()), kConv, "gathered_conv2d", source,
               weight);
  if (is_there(grad_switch)) {
    sum_terms(partial, *grad_switch, p.result_list, p.reduce_off ? nullptr : p.stored, products, on);
  }
}

void pack(const Tensor& result, const Tensor& source, const std::vector<Tensor>& lists,
          const std::vector<int64_t>& runs, const OptionalStable& used, const OptionalStable& scale,
          const OptionalStable& shift, const std::vector<int64_t>& options) {
  constexpr const char* kPack = "_channel_pack_cuda";
  PackOptions o;
  STD_TORCH_CHECK(options_of(options, o), kPack, "(): expected ", sizeof(o) / 8, " options, got ", options.size(), ".");
  const OnDevice on(source);
  ChannelPackParams p{};
  p.source = source.const_data_ptr();
  p.result = result.mutable_data_ptr();
  p.source_stride = strides_of(source);
  p.runs = runs_of(kPack, {}, lists, runs);
  p.used = count_pointer(used);
  p.batch = images_of(p.runs);
  p.height = static_cast<int>(source.size(2));
  p.width = static_cast<int>(source.size(3));
  p.padded = static_cast<int>(result.size(3));
  p.scale = vector_params(scale);
  p.shift = vector_params(shift);
  p.relu = o.relu != 0;
  check_launch(launch_channel_pack(p, products_of(source, false, kPack), on.stream()), kPack, "channel_pack", source,
               result);
}

// Whether work on the tensor's device is being captured into a graph, when no list may be read.
bool capturing(const Tensor& t) {
  const OnDevice on(t);
#if defined(BAP_KERNELS_SIMULATED)
  return false;
#else
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const cudaError_t error = cudaStreamIsCapturing(static_cast<cudaStream_t>(on.stream()), &status);
  return error != cudaSuccess || status != cudaStreamCaptureStatusNone;
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(bap_kernels, m) {
  m.def(
      "_gathered_conv2d_cuda(Tensor(a!)? result, Tensor source, Tensor[] weights, Tensor[] lists, int[] runs, "
      "Tensor? result_list, Tensor? bias, Tensor? scale, Tensor? shift, Tensor? residual, Tensor? depth, "
      "Tensor? stored, Tensor? input, Tensor(b!)? grad_switch, Tensor? source_scale, Tensor? source_shift, "
      "Tensor(c!)? copy, Tensor? copy_list, int[] options) -> ()");
  m.def(
      "_channel_pack_cuda(Tensor(a!) result, Tensor source, Tensor[] lists, int[] runs, Tensor? used, Tensor? scale, "
      "Tensor? shift, int[] options) -> ()");
  m.def("_capturing_cuda(Tensor t) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(bap_kernels, BAP_KERNELS_DEVICE_KEY, m) {
  m.impl("_gathered_conv2d_cuda", TORCH_BOX(&conv));
  m.impl("_channel_pack_cuda", TORCH_BOX(&pack));
  m.impl("_capturing_cuda", TORCH_BOX(&capturing));
}

}  // namespace bap_kernels
