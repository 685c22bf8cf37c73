// From tensors to the launches of bap_kernels._C_cuda.
#pragma once

#include "backends/cuda/kernels/launcher.h"
#include "backends/cuda/weights.h"
#include "dispatch/list_form.h"
#include "ops/conv_call.h"

#include <c10/util/FunctionRef.h>

#include <functional>

namespace bap_kernels {

// The launches, once the loader has handed them over; null before.
const CudaLauncher* cuda_launcher();
// Raises ImportError where the table was made from other sources than this library.
void set_cuda_launcher(const CudaLauncher* launcher);

// Where the source of a convolution lies: channels side by side, pixels side by side (1x1 kernels), or either with a
// halo.
enum class ConvRoute { kRows, kPlanes, kHalo };

// Images that share a list of the source's channels, and what packs the weight for it in the form that is read.
struct LaunchRun {
  std::function<at::Tensor(WeightForm)> weight;
  ListForm list;
  int64_t first, images;
};

// One launch of the implicit GEMM, or one for each kMaxRuns runs; what is absent is not done. See ConvParams.
struct ConvLaunch {
  OptionalTensor result;
  at::Tensor source;
  std::vector<LaunchRun> runs;
  ListForm result_list;
  OptionalTensor bias, scale, shift, residual;
  OptionalTensor source_scale, source_shift;
  OptionalTensor depth, stored;       // counts on the device, int32, (1,)
  OptionalTensor input, grad_switch;  // terms of a switch's gradient, added into its listed places
  // A second store of the columns that `copy_list` names, into a tensor that is made where the launch can fill it.
  OptionalTensor copy_list;
  at::Tensor* copy = nullptr;
  at::MemoryFormat copy_format = at::MemoryFormat::Contiguous;
  ConvAxis h, w;
  int64_t columns = 0;
  ConvRoute route = ConvRoute::kRows;
  bool gradient = false, full_width = false, relu = false, reduce_off = false, source_relu = false;
};
void launch_conv(const ConvLaunch& launch);

// The same into a result of any layout. With `spread` it is computed in a compact NHWC tensor and spread from there.
// Unlisted channels of a result of full width become zeros.
void launch_conv_into_result(ConvLaunch launch, bool spread);

// What the choice of kernels asks a tensor's device.
struct DeviceFacts {
  int sm_count;
  bool has_warpgroups;
};
DeviceFacts device_facts(const at::Tensor& t);

// Calls `body` with the number of the first run of each launch and that behind its last, kMaxRuns at a time, and their
// images.
void for_chunks(const std::vector<LaunchRun>& runs, c10::function_ref<void(size_t, size_t, int)> body);

// The gradient (C_out, C_in, kH, kW) at the listed places; `source` holds the channels that `source_list` reads.
void launch_weight_gradient(const at::Tensor& result, const at::Tensor& grad, const at::Tensor& source,
                            const ListForm& source_list, const ListForm& rows, const ListForm& columns,
                            const OptionalTensor& used, const ConvAxis& h, const ConvAxis& w);

// A compact NHWC copy (N, K rounded up, H, W) of the listed channels of each run, zeros behind them. With a count, what
// lies beyond it is not read and may be left unwritten.
at::Tensor packed_channels(const at::Tensor& source, const std::vector<LaunchRun>& runs,
                           const OptionalTensor& used = {}, const Fusion& prologue = {});
// The same of one list for all images.
at::Tensor packed_channels(const at::Tensor& source, const ListForm& list, const OptionalTensor& used = {});

// Spreads the channels of such a copy over the listed ones of `result`, zeros between them. With a count, channels
// beyond it are taken for zeros and not read.
void unpack_channels(const at::Tensor& result, const at::Tensor& copy, const ListForm& list,
                     const OptionalTensor& used = {});

// Whether the kernels can copy runs of 16 bytes from the tensor: of channels, or with `planes` of pixels.
bool aligned_chunks(const at::Tensor& t, bool planes);

// Why no kernel covers a call; empty if one does.
std::string uncovered_reason(const at::Tensor& input, const at::Tensor& weight, int64_t groups, int64_t out_h,
                             int64_t out_w);
// Raises NotImplementedError where no kernel covers a call.
void refuse_uncovered(const char* op, const at::Tensor& input, const at::Tensor& weight, int64_t groups, int64_t out_h,
                      int64_t out_w);

std::array<ConvAxis, 2> axes_of(const at::Tensor& input, const at::Tensor& weight, int64_t out_h, int64_t out_w,
                                c10::IntArrayRef stride, c10::IntArrayRef padding, c10::IntArrayRef dilation);

// Whether each result pixel meets the input pixel at its place and no other.
bool pointwise(const std::array<ConvAxis, 2>& axes);

}  // namespace bap_kernels
