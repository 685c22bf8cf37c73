// Op `_channel_gather_cuda`: checks and launches the channel gather, over torch's stable ABI.
//   _channel_gather_cuda(input (N, C_in, H, W), index (K_in,) int32) -> (N, K_in, H, W)
// The result is channels_last where the input is, else contiguous. Index values are asserted on the device only:
// reading them here would stall the stream. The stable ABI carries a message but no exception type: each error is a
// RuntimeError.

#include "backends/cuda/kernels/channel_gather.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <string>

namespace bap_kernels {
namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::string shape_text(const Tensor& tensor) {
  std::string text = "(";
  for (int64_t d = 0; d < tensor.dim(); ++d) text += (d ? ", " : "") + std::to_string(tensor.size(d));
  return text + ")";
}

// A tensor that is both, such as one with H = W = 1, counts as planar, whose copy is the faster one.
bool is_channels_last(const Tensor& x) {
  const bool dense_channels = x.stride(1) == 1 && x.stride(3) == x.size(1) && x.stride(2) == x.size(3) * x.size(1);
  return dense_channels && x.size(1) > 1 && x.size(2) * x.size(3) > 1;
}

Tensor channel_gather_cuda(const Tensor& input, const Tensor& index) {
  STD_TORCH_CHECK(input.is_cuda(), "_channel_gather_cuda(): expected `input` to be on a CUDA device.");
  STD_TORCH_CHECK(input.dim() == 4, "_channel_gather_cuda(): expected `input` to be (N, C_in, H, W), got ",
                  shape_text(input), ".");
  STD_TORCH_CHECK(index.scalar_type() == ScalarType::Int && index.dim() == 1,
                  "_channel_gather_cuda(): expected `index` to be 1-D and int32, got shape ", shape_text(index), ".");
  STD_TORCH_CHECK(index.is_cuda() && index.get_device_index() == input.get_device_index(),
                  "_channel_gather_cuda(): expected `index` to be on the device of `input`.");
  const auto element_bytes = static_cast<int>(input.element_size());
  STD_TORCH_CHECK(element_bytes <= 8, "_channel_gather_cuda(): expected elements of 1, 2, 4 or 8 bytes, got ",
                  element_bytes, ".");

  const auto device = input.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const bool channels_last = is_channels_last(input);
  const std::array<int64_t, 4> sizes = {input.size(0), index.size(0), input.size(2), input.size(3)};
  Tensor result =
      torch::stable::empty({sizes.data(), sizes.size()}, input.scalar_type(), std::nullopt, input.device(),
                           std::nullopt, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);

  ChannelGatherParams params{};
  params.x = input.const_data_ptr();
  params.index = static_cast<const int32_t*>(index.const_data_ptr());
  params.y = result.mutable_data_ptr();
  params.batch = sizes[0];
  params.channels = input.size(1);
  params.kept = sizes[1];
  params.height = sizes[2];
  params.width = sizes[3];
  params.stride_xn = input.stride(0);
  params.stride_xc = input.stride(1);
  params.stride_xh = input.stride(2);
  params.stride_xw = input.stride(3);
  params.stride_index = index.stride(0);
  params.element_bytes = element_bytes;
  params.channels_last = channels_last;

  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const cudaError_t status = launch_channel_gather(params, static_cast<cudaStream_t>(stream));
  STD_TORCH_CHECK(status == cudaSuccess, "_channel_gather_cuda(): channel_gather did not launch for input ",
                  shape_text(input), " and index ", shape_text(index), ": ", cudaGetErrorString(status), ".");
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(bap_kernels, m) { m.def("_channel_gather_cuda(Tensor input, Tensor index) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(bap_kernels, CUDA, m) { m.impl("_channel_gather_cuda", TORCH_BOX(&channel_gather_cuda)); }

}  // namespace bap_kernels
