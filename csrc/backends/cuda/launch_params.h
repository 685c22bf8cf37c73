// From tensors to the parameters of the kernels: what the launches share.
#pragma once

#include <c10/core/DeviceGuard.h>

#include "backends/cuda/launches.h"

namespace bap_kernels {

// The launches; they have been handed over.
const CudaLauncher& launcher();

// Makes the tensors' device current as long as it lives, and knows its current stream.
struct OnDevice {
  explicit OnDevice(const at::Tensor& t);
  c10::OptionalDeviceGuard guard;
  void* stream;
  int index;
};

// Raises where a kernel did not launch; the tensors' shapes are part of the message.
void check_launch(Status status, const char* kernel, const at::Tensor& source, const at::Tensor& other);

MathMode products_of(const at::Tensor& t);
Strides strides_of(const at::Tensor& t);
// The same of a tensor whose chunks are copied. Addresses outside of it are computed, too, which nothing is read from
// but which have to be aligned: along an axis of one place a tensor may have any stride, and needs none.
Strides copied_strides(const at::Tensor& t);
ListParams list_params(const ListForm& list);
VectorParams vector_params(const OptionalTensor& t);
const int32_t* count_pointer(const OptionalTensor& t);

OptionalTensor dense(const OptionalTensor& vector);
at::Tensor new_floats(at::IntArrayRef sizes, const at::Tensor& like);
// A compact NHWC tensor (N, channels rounded up, H, W) for a tensor (N, C, H, W).
at::Tensor new_copy(const at::Tensor& t, int64_t channels);

// Calls `body` with the runs of each launch, without weights, the number of the first, and their number of images.
void for_launches(const std::vector<LaunchRun>& runs, c10::function_ref<void(const Runs&, size_t, int)> body);

}  // namespace bap_kernels
