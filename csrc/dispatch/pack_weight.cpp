// See pack_weight.h.
#include "dispatch/pack_weight.h"

#include <ATen/ops/zeros.h>

#include "dispatch/packed_cache.h"

namespace bap_kernels {

at::Tensor pack_weight(const at::Tensor& weight, const OptionalTensor& rows, const OptionalTensor& columns,
                       bool by_input) {
  at::Tensor w = has_value(rows) ? weight.index_select(0, *rows) : weight;
  if (has_value(columns)) w = w.index_select(1, *columns);
  w = by_input ? w.permute({1, 2, 3, 0}) : w.permute({0, 2, 3, 1});
  const int64_t length = w.size(3), taps = w.size(1) * w.size(2);
  const at::Tensor packed =
      at::zeros({w.size(0), w.size(1), w.size(2), packed_length(length)}, w.options().memory_format(std::nullopt));
  packed.narrow(3, 0, length).copy_(w);
  return packed.view({w.size(0), taps, packed.size(3)});
}

at::Tensor packed_by_filter(const ConvCall& c) {
  return PackedCache::instance().get(c, PackedKind::kByFilter, 0, [&] {
    return pack_weight(c.weight, c.out_index, c.weight_list(), /*by_input=*/false);
  });
}

}  // namespace bap_kernels
