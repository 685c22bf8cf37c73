// Convolution with a reordered weight, by PyTorch's private oneDNN operators: looked up by name, since a build of
// PyTorch without oneDNN has none of them and another version may have changed them.
#include "backends/aten/packed_convolution.h"

#include <ATen/Parallel.h>
#include <ATen/core/List.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/hash.h>

#include "dispatch/measured_case.h"
#include "dispatch/packed_cache.h"

namespace bap_kernels {
namespace {

using Reorder = at::Tensor(const at::Tensor&, c10::IntArrayRef, c10::IntArrayRef, c10::IntArrayRef, int64_t,
                           c10::OptionalIntArrayRef);
using Scalars = torch::List<std::optional<at::Scalar>>;
using Pointwise = at::Tensor(const at::Tensor&, const at::Tensor&, const OptionalTensor&, c10::IntArrayRef,
                             c10::IntArrayRef, c10::IntArrayRef, int64_t, std::string_view, Scalars,
                             std::optional<std::string_view>);

// The operator, or nothing where it is missing or takes other arguments.
template <class Signature>
std::optional<c10::TypedOperatorHandle<Signature>> find(const char* name) {
  const auto op = c10::Dispatcher::singleton().findSchema({name, ""});
  if (!op.has_value()) return std::nullopt;
  try {
    return op->typed<Signature>();
  } catch (const c10::Error&) {
    return std::nullopt;
  }
}

const auto& reorder_op() {
  static const auto op = find<Reorder>("mkldnn::_reorder_convolution_weight");
  return op;
}

const auto& pointwise_op() {
  static const auto op = find<Pointwise>("mkldnn::_convolution_pointwise");
  return op;
}

bool bfloat16_runs() {
  static const bool runs = [] {
    const auto op = find<bool()>("mkldnn::_is_mkldnn_bf16_supported");
    return op.has_value() && op->call();
  }();
  return runs;
}

// Most orders of one weight that are kept for inputs of different sizes.
constexpr size_t kMostOrders = 4;

// The order that oneDNN wants depends on all of this. Cases of one number share an entry: the result stays right,
// because oneDNN reorders a weight that it finds in another order. Most sizes want the same.
int variant(const at::Tensor& x, const ConvCall& c, c10::IntArrayRef padding) {
  const auto add = [](size_t hash, c10::IntArrayRef list) {
    for (const int64_t v : list) hash = c10::hash_combine(hash, c10::get_hash(v));
    return hash;
  };
  size_t hash = c10::get_hash(static_cast<int64_t>(at::get_num_threads()), static_cast<int64_t>(c.format()));
  for (const auto& list : {c.stride, padding, c.dilation}) hash = add(hash, list);
  return static_cast<int>(hash / kMostOrders * kMostOrders + add(0, x.sizes()) % kMostOrders);
}

}  // namespace

bool packed_convolution_applies(const ConvCall& c) {
  const auto dtype = c.input.scalar_type();
  return c.input.device().is_cpu() && onednn_enabled() && PackedCache::keeps(c) &&
         (dtype == at::kFloat || (dtype == at::kBFloat16 && bfloat16_runs())) && reorder_op().has_value() &&
         pointwise_op().has_value();
}

at::Tensor packed_convolution(const ConvCall& c, const at::Tensor& x, c10::IntArrayRef padding, const at::Tensor& bias,
                              c10::function_ref<at::Tensor()> slice) {
  const int64_t groups = c.shape.depthwise ? c.shape.kept_in : 1;
  const auto make = [&] {
    return reorder_op()->call(slice(), padding, c.stride, c.dilation, groups, c10::OptionalIntArrayRef(x.sizes()));
  };
  const at::Tensor packed = PackedCache::instance().get(c, PackedKind::kReordered, variant(x, c, padding), make);
  // A bias with gaps would be read as if it had none.
  const auto listed = bias.defined() ? OptionalTensor(bias.contiguous()) : std::nullopt;
  return pointwise_op()->call(x, packed, listed, padding, c.stride, c.dilation, groups, "none", Scalars(), "");
}

}  // namespace bap_kernels
