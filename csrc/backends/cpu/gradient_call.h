// One checked backward call, prepared for the native kernels.
#pragma once

#include <vector>

#include "ops/gathered_conv2d.h"

namespace bap_kernels {

struct GradientCall {
  const at::Tensor& grad_output;  // (N, K_out, oH, oW), one channel for each listed filter
  const at::Tensor& input;
  const at::Tensor& weight;
  c10::IntArrayRef stride, padding, dilation;
  ConvShape<int64_t> shape;
  const int32_t* in_index = nullptr;   // null: all
  const int32_t* out_index = nullptr;  // null: all

  // Channels of grad_output that hold anything but zeros, and the filters that they belong to. Empty `live` with
  // all_live set: every one.
  bool all_live = true;
  std::vector<int32_t> live, live_filters;

  int64_t taps() const { return shape.kernel_h * shape.kernel_w; }
  int64_t live_count() const { return all_live ? shape.kept_out : static_cast<int64_t>(live.size()); }
  // Place in grad_output, and filter, of the j-th live channel.
  int64_t live_channel(int64_t j) const { return all_live ? j : live[j]; }
  int64_t live_filter(int64_t j) const {
    if (!all_live) return live_filters[j];
    return out_index ? out_index[j] : j;
  }
  bool bfloat16() const { return input.scalar_type() == at::kBFloat16; }
};

// Null for all channels, which an empty list must not be.
inline const int32_t* list_pointer(const OptionalTensor& list) {
  static const int32_t nothing = 0;
  if (!has_value(list)) return nullptr;
  return list->numel() > 0 ? list->const_data_ptr<int32_t>() : &nothing;
}

// Fills in `live`: a filter whose consumers are all off gets a gradient of zeros, which batch norm and ReLU keep. They
// are those that `read`, bool, names, if it may be trusted; else they are searched for. Where there are none, the first
// pixels tell.
void find_live_channels(GradientCall& call, const OptionalTensor& read = {}, int64_t reader = 0);

// Which input channels' gradients are wanted, and what becomes of them.
struct InputGradient {
  const int32_t* channels;  // those computed; null: all
  int64_t count;
  const uint32_t* keep;  // for each of them all bits set, or none where the result shall hold zeros; null: all kept
  bool store;            // whether the gradient itself is wanted
  bool dots;             // whether <x_c, dx_c> of the computed channels is wanted

  at::Tensor grad_input;    // out: full size, zeros in channels that are not computed or not kept
  std::vector<double> dot;  // out
};

void run_input_gradient(const GradientCall& call, InputGradient& gradient);

// (C_out, C_in, kH, kW), zeros outside the listed slices.
at::Tensor native_weight_gradient(const GradientCall& call);

}  // namespace bap_kernels
