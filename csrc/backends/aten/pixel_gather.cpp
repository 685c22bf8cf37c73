// y[n, h, w, i] = x[n, h, w, index[i]]; one task copies whole rows of pixels. The few channels of a first layer have
// loops of their own: around so short a loop everything else would cost more than the copies.
#include "backends/aten/pixel_gather.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>

namespace bap_kernels {
namespace {

constexpr int64_t kElementsPerThread = 32 * 1024;

// A row of `width` pixels that lie `step` elements apart; kCount is K_in where it is known, else 0.
template <int kCount, class word_t>
void gather_row(const word_t* x, word_t* y, const int32_t* index, int64_t count, int64_t width, int64_t step) {
  const int64_t kept = kCount > 0 ? kCount : count;
  for (int64_t w = 0; w < width; ++w, x += step, y += kept) {
    for (int64_t i = 0; i < kept; ++i) y[i] = x[index[i]];
  }
}

template <class word_t>
void gather_rows(const at::Tensor& x, at::Tensor& y, const int32_t* index, int64_t count) {
  const int64_t height = x.size(2), width = x.size(3), rows = x.size(0) * height;
  const auto* src = static_cast<const word_t*>(x.const_data_ptr());
  auto* dst = static_cast<word_t*>(y.mutable_data_ptr());
  const int64_t step_n = x.stride(0), step_h = x.stride(2), step_w = x.stride(3);
  const auto run = count == 1   ? gather_row<1, word_t>
                   : count == 2 ? gather_row<2, word_t>
                   : count == 3 ? gather_row<3, word_t>
                                : gather_row<0, word_t>;
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, width * count));
  at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      run(src + r / height * step_n + r % height * step_h, dst + r * width * count, index, count, width, step_w);
    }
  });
}

}  // namespace

bool gather_pixels_applies(const at::Tensor& x) {
  return x.device().is_cpu() && x.suggest_memory_format() == at::MemoryFormat::ChannelsLast && x.stride(1) == 1 &&
         (x.element_size() == 4 || x.element_size() == 2);
}

at::Tensor gather_pixels(const at::Tensor& x, const at::Tensor& index) {
  const at::Tensor list = index.contiguous();
  at::Tensor y = at::empty({x.size(0), list.numel(), x.size(2), x.size(3)},
                           x.options().memory_format(at::MemoryFormat::ChannelsLast));
  if (x.element_size() == 4) {
    gather_rows<uint32_t>(x, y, list.const_data_ptr<int32_t>(), list.numel());
  } else {
    gather_rows<uint16_t>(x, y, list.const_data_ptr<int32_t>(), list.numel());
  }
  return y;
}

}  // namespace bap_kernels
