// See packed_convolution.h.
#include "backends/aten/packed_convolution.h"

#include <ATen/Parallel.h>
#include <c10/util/hash.h>

#include "backends/aten/onednn.h"
#include "dispatch/packed_cache.h"

namespace bap_kernels {
namespace {

// Most orders of one weight that are kept for inputs of different sizes.
constexpr size_t kMostOrders = 4;

}  // namespace

bool packed_convolution_applies(const ConvCall& c) {
  return c.input.device().is_cpu() && PackedCache::keeps(c) && onednn_reorders(c.input.scalar_type());
}

// The order that oneDNN wants depends on all of this. Cases of one number share an entry: the result stays right,
// because oneDNN reorders a weight that it finds in another order. Most sizes want the same.
int reordered_variant(const ConvCall& c, c10::IntArrayRef size, c10::IntArrayRef padding) {
  const auto add = [](size_t hash, c10::IntArrayRef list) {
    for (const int64_t v : list) hash = c10::hash_combine(hash, c10::get_hash(v));
    return hash;
  };
  size_t hash = c10::get_hash(static_cast<int64_t>(at::get_num_threads()), static_cast<int64_t>(c.format()));
  for (const auto& list : {c.stride, padding, c.dilation}) hash = add(hash, list);
  return static_cast<int>(hash / kMostOrders * kMostOrders + add(0, size) % kMostOrders);
}

}  // namespace bap_kernels
