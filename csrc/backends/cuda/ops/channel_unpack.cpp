// Private op of the CUDA backend over torch's stable ABI: the inverse of the compact copy; see gathered_conv2d.cpp.
#include "backends/cuda/ops/tensors.h"

namespace bap_kernels {
namespace {

constexpr const char* kOp = "_channel_unpack_cuda";

void unpack(const Tensor& result, const Tensor& source, const OptionalStable& list, const OptionalStable& used,
            const std::vector<int64_t>& options) {
  UnpackOptions o;
  STD_TORCH_CHECK(options_of(options, o), kOp, "(): expected ", sizeof(o) / 8, " options, got ", options.size(), ".");
  STD_TORCH_CHECK(source.dim() == 4 && source.is_contiguous() && source.scalar_type() == result.scalar_type() &&
                      result.dim() == 4 && source.size(0) == result.size(0) && source.size(1) == result.size(2) &&
                      source.size(2) == result.size(3),
                  kOp, "(): expected a dense source (N, H, W, K) for a result (N, C, H, W) of its dtype, got ",
                  shape_text(source), " for ", shape_text(result), ".");
  STD_TORCH_CHECK(o.depth <= source.size(3) && o.depth <= result.size(1), kOp, "(): expected ", o.depth,
                  " channels in source and result, got ", source.size(3), " and ", result.size(1), ".");
  const OnDevice on(source);
  ChannelUnpackParams p{};
  p.source = source.const_data_ptr();
  p.result = result.mutable_data_ptr();
  p.result_stride = strides_of(result);
  p.list = list_params(list, o.block);
  p.depth = static_cast<int>(o.depth);
  p.used = count_pointer(used);
  p.batch = static_cast<int>(result.size(0));
  p.channels = static_cast<int>(result.size(1));
  p.height = static_cast<int>(result.size(2));
  p.width = static_cast<int>(result.size(3));
  p.padded = static_cast<int>(source.size(3));
  const int64_t vector = kChunkBytes / static_cast<int64_t>(result.element_size());
  p.result_vector = chunks_are_aligned(result, true) && result.size(2) * result.size(3) % vector == 0;
  check_launch(launch_channel_unpack(p, products_of(source, false, kOp), on.stream()), kOp, "channel_unpack", source,
               result);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(bap_kernels, m) {
  m.def("_channel_unpack_cuda(Tensor(a!) result, Tensor source, Tensor? list, Tensor? used, int[] options) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(bap_kernels, BAP_KERNELS_DEVICE_KEY, m) {
  m.impl("_channel_unpack_cuda", TORCH_BOX(&unpack));
}

}  // namespace bap_kernels
