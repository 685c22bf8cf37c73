// See weights.h.
#include "backends/cuda/weights.h"

#include <ATen/ops/empty.h>

#include "backends/cuda/kernels/weight_tiles.h"
#include "backends/cuda/launch_params.h"
#include "dispatch/pack_weight.h"
#include "dispatch/packed_cache.h"

namespace bap_kernels {
namespace {

at::Tensor weight_tiles(const at::Tensor& weight, const OptionalTensor& filters, const OptionalTensor& channels,
                        bool by_input, const OptionalTensor& used) {
  // Channel by channel: to look for blocks would wait for the device.
  const ListForm rows = list_form(filters, weight.size(0), /*blocks=*/false);
  const ListForm columns = list_form(channels, weight.size(1), /*blocks=*/false);
  const ListForm &column_list = by_input ? columns : rows, &depth_list = by_input ? rows : columns;
  const int64_t groups = tiles_of(column_list.length, kWeightTileColumns);
  const int64_t blocks = tiles_of(depth_list.length, kWeightTileDepth), taps = weight.size(2) * weight.size(3);
  const at::Tensor tiles =
      at::empty({groups, taps, blocks * kWeightTileElements}, weight.options().memory_format(std::nullopt));
  if (tiles.numel() == 0) return tiles;
  const OnDevice on(weight);
  WeightTilesParams p{};
  p.weight = weight.const_data_ptr();
  p.result = tiles.mutable_data_ptr();
  p.stride_column = weight.stride(by_input ? 1 : 0);
  p.stride_depth = weight.stride(by_input ? 0 : 1);
  p.stride_h = weight.stride(2);
  p.stride_w = weight.stride(3);
  p.column_list = list_params(column_list);
  p.depth_list = list_params(depth_list);
  p.used = count_pointer(used);
  p.columns = static_cast<int>(column_list.length);
  p.depth = static_cast<int>(depth_list.length);
  p.taps = static_cast<int>(taps);
  p.kernel_w = divisor_of(static_cast<int>(weight.size(3)));
  p.blocks = divisor_of(static_cast<int>(blocks));
  check_launch(launcher().weight_tiles(p, on.stream), "weight_tiles", weight, tiles);
  return tiles;
}

}  // namespace

at::Tensor packed_weight(const ConvCall& c, WeightForm form) {
  if (form == WeightForm::kRows) return packed_by_filter(c);
  return PackedCache::instance().get(c, PackedKind::kWeightTiles, 0, [&] {
    return weight_tiles(c.weight, c.out_index, c.weight_list(), /*by_input=*/false, {});
  });
}

at::Tensor packed_weight(const at::Tensor& weight, const OptionalTensor& filters, const OptionalTensor& channels,
                         bool by_input, WeightForm form, const OptionalTensor& used) {
  if (form == WeightForm::kRows) return pack_weight(weight, filters, channels, by_input);
  return weight_tiles(weight, filters, channels, by_input, used);
}

}  // namespace bap_kernels
