// See linear.h.
#include "backends/aten/linear.h"

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/addmv.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mv.h>

#include <algorithm>

#include "ops/plain_tensor.h"

namespace bap_kernels {
namespace {

constexpr int64_t kMostSamples = 4;
// Parts of the weight are cut by size alone, so that results do not depend on the number of threads.
constexpr int64_t kBytesPerPart = 256 * 1024;

bool is_plain_matrix(const at::Tensor& t) {
  return is_plain_tensor(t) && t.dim() == 2 && t.scalar_type() == at::kFloat && t.is_contiguous();
}

bool serves(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias) {
  if (!is_plain_matrix(x) || !is_plain_matrix(weight) || !calls_keep_dtypes()) return false;
  if (x.size(1) != weight.size(1) || x.size(0) < 1 || x.size(0) > kMostSamples) return false;
  if (static_cast<int64_t>(weight.nbytes()) < 2 * kBytesPerPart) return false;
  if (!has_value(bias)) return true;
  return is_plain_tensor(*bias) && bias->scalar_type() == at::kFloat && bias->dim() == 1 &&
         bias->size(0) == weight.size(0) && bias->is_contiguous();
}

}  // namespace

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias) {
  if (!serves(x, weight, bias)) return at::linear(x, weight, bias);
  const int64_t samples = x.size(0), rows = weight.size(0);
  const int64_t row_bytes = static_cast<int64_t>(weight.nbytes()) / rows;
  const int64_t per_part = std::max<int64_t>(1, kBytesPerPart / row_bytes);
  at::Tensor result = at::empty({samples, rows}, x.options());
  at::parallel_for(0, (rows + per_part - 1) / per_part, 1, [&](int64_t first, int64_t last) {
    const at::AutoDispatchBelowADInplaceOrView kernels_only;
    for (int64_t part = first; part < last; ++part) {
      const int64_t begin = part * per_part, count = std::min(per_part, rows - begin);
      const at::Tensor some = weight.narrow(0, begin, count);
      at::Tensor out = result.narrow(1, begin, count);
      if (samples == 1) {
        at::Tensor vector = out.view({count});
        if (has_value(bias)) {
          at::addmv_out(vector, bias->narrow(0, begin, count), some, x.view({-1}));
        } else {
          at::mv_out(vector, some, x.view({-1}));
        }
      } else if (has_value(bias)) {
        at::addmm_out(out, bias->narrow(0, begin, count), x, some.t());
      } else {
        at::mm_out(out, x, some.t());
      }
    }
  });
  return result;
}

}  // namespace bap_kernels
