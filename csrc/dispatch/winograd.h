// Whether the calling thread lets `auto` take Winograd convolutions, and where there could be one.
#pragma once

#include "ops/conv_call.h"

namespace bap_kernels {

// The setting of the calling thread. A thread begins with the default, BAP_KERNELS_WINOGRAD.
void set_winograd(bool allowed);
bool get_winograd();
void set_default_winograd(bool allowed);

// For tests: the edge of the tiles, 4 or 2, with which the calling thread's native kernels compute whatever Winograd
// covers, whether or not it is allowed; 0: as measured.
void force_winograd(int64_t size);
int64_t forced_winograd();

// What Winograd's kernels cover: 3 x 3 taps, stride 1, dilation 1, one group.
template <class Int>
bool winograd_shape(const ConvShape<Int>& s, c10::ArrayRef<Int> stride, c10::ArrayRef<Int> dilation) {
  return s.kernel_h == 3 && s.kernel_w == 3 && stride[0] == 1 && stride[1] == 1 && dilation[0] == 1 &&
         dilation[1] == 1 && !s.depthwise;
}

// Whether the setting matters to a call.
inline bool weighs_winograd(const ConvCall& c) {
  return c.input.is_cpu() && c.input.scalar_type() == at::kFloat && winograd_shape(c.shape, c.stride, c.dilation);
}

// A setting for the calling thread until the scope ends: one that another thread has made.
class WinogradScope {
 public:
  explicit WinogradScope(bool allowed) : previous_(get_winograd()) { set_winograd(allowed); }
  ~WinogradScope() { set_winograd(previous_); }
  WinogradScope(const WinogradScope&) = delete;
  WinogradScope& operator=(const WinogradScope&) = delete;

 private:
  bool previous_;
};

}  // namespace bap_kernels
