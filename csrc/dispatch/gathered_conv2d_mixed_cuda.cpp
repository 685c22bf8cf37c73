// The gathered convolution of mixed batches on CUDA devices: run by run through ATen, or all at once by the backend
// that is named.
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <c10/util/irange.h>
#include <torch/library.h>

#include "backends/aten/gathered_conv2d.h"
#include "dispatch/named_backend.h"

namespace bap_kernels {
namespace {

at::Tensor gathered_conv2d_mixed_cuda(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                                      const OptionalTensorList& in_indices, c10::IntArrayRef counts,
                                      c10::IntArrayRef stride, c10::IntArrayRef padding, c10::IntArrayRef dilation,
                                      bool cache_packed) {
  const char* op = "_gathered_conv2d_mixed";
  const auto shape =
      check_gathered_conv2d_mixed<int64_t>(op, input, weight, bias, in_indices, counts, stride, padding, dilation);
  std::vector<MixedRun> runs;
  int64_t first = 0;
  for (const auto i : c10::irange(counts.size())) {
    if (counts[i] > 0) runs.push_back({input.narrow(0, first, counts[i]), {}, in_indices.get(i)});
    first += counts[i];
  }
  std::vector<ConvCall> calls;
  for (const MixedRun& run : runs) {
    calls.push_back(mixed_run_call(run, weight, bias, stride, padding, dilation, cache_packed, shape));
  }
  if (const NamedBackend* named = named_backend()) {
    const at::Tensor output = at::empty({shape.batch, shape.channels_out, shape.out_h, shape.out_w},
                                        input.options().memory_format(input.suggest_memory_format()));
    named->mixed(output, runs, calls, input, op);
    return output;
  }
  std::vector<at::Tensor> parts;
  for (const ConvCall& call : calls) {
    parts.push_back(call.trivial() ? trivial_gathered_conv2d(call) : aten_gathered_conv2d(call, AtenRoute::kGather));
  }
  if (parts.empty()) {
    return at::empty({0, shape.channels_out, shape.out_h, shape.out_w}, input.options());
  }
  return at::cat(parts).contiguous(input.suggest_memory_format());
}

}  // namespace

TORCH_LIBRARY_IMPL(bap_kernels, CUDA, m) { m.impl("_gathered_conv2d_mixed", gathered_conv2d_mixed_cuda); }

}  // namespace bap_kernels
