// The launches around a convolution that copy channels: into a compact tensor, and from one.
#include <algorithm>

#include "backends/cuda/launch_params.h"

namespace bap_kernels {

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
  for_launches(runs, [&](const Runs& part, size_t, int images) {
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

}  // namespace bap_kernels
