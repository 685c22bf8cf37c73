// See onednn.h.
#include "backends/aten/onednn.h"

#include <ATen/core/List.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include "dispatch/measured_case.h"

namespace bap_kernels {
namespace {

using Reorder = at::Tensor(const at::Tensor&, c10::IntArrayRef, c10::IntArrayRef, c10::IntArrayRef, int64_t,
                           c10::OptionalIntArrayRef);
using Scalars = torch::List<std::optional<at::Scalar>>;
using Pointwise = at::Tensor(const at::Tensor&, const at::Tensor&, const OptionalTensor&, c10::IntArrayRef,
                             c10::IntArrayRef, c10::IntArrayRef, int64_t, std::string_view, Scalars,
                             std::optional<std::string_view>);
using PointwiseBinary = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const OptionalTensor&,
                                   c10::IntArrayRef, c10::IntArrayRef, c10::IntArrayRef, int64_t, std::string_view,
                                   std::optional<at::Scalar>, std::optional<std::string_view>, Scalars,
                                   std::optional<std::string_view>);

// The operator, or nothing where it is missing or takes other arguments.
template <class Signature>
std::optional<c10::TypedOperatorHandle<Signature>> find(const char* name, const char* overload = "") {
  const auto op = c10::Dispatcher::singleton().findSchema({name, overload});
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

const auto& binary_op() {
  static const auto op = find<PointwiseBinary>("mkldnn::_convolution_pointwise", "binary");
  return op;
}

bool bfloat16_runs() {
  static const bool runs = [] {
    const auto op = find<bool()>("mkldnn::_is_mkldnn_bf16_supported");
    return op.has_value() && op->call();
  }();
  return runs;
}

bool runs(at::ScalarType dtype) {
  return onednn_enabled() && (dtype == at::kFloat || (dtype == at::kBFloat16 && bfloat16_runs()));
}

}  // namespace

bool onednn_reorders(at::ScalarType dtype) {
  return runs(dtype) && reorder_op().has_value() && pointwise_op().has_value();
}

at::Tensor onednn_reorder(const at::Tensor& w, const ConvolutionOptions& o, c10::IntArrayRef size) {
  return reorder_op()->call(w, o.padding, o.stride, o.dilation, o.groups, c10::OptionalIntArrayRef(size));
}

bool onednn_convolves(at::ScalarType dtype, int64_t groups, const ConvolutionEpilogue& epilogue) {
  if (!epilogue.residual.defined()) return runs(dtype) && pointwise_op().has_value();
  return runs(dtype) && groups == 1 && !epilogue.clamp.most && binary_op().has_value();
}

at::Tensor onednn_convolution(const at::Tensor& x, const at::Tensor& w, const ConvolutionEpilogue& e,
                              const ConvolutionOptions& o) {
  // A bias with gaps would be read as if it had none.
  const auto bias = e.bias.defined() ? OptionalTensor(e.bias.contiguous()) : std::nullopt;
  if (!e.residual.defined()) {
    const char* name = e.clamp.most ? "hardtanh" : e.clamp.relu ? "relu" : "none";
    Scalars limits;
    if (e.clamp.most) {
      limits.push_back(at::Scalar(0));
      limits.push_back(at::Scalar(*e.clamp.most));
    }
    return pointwise_op()->call(x, w, bias, o.padding, o.stride, o.dilation, o.groups, name, std::move(limits), "");
  }
  const auto relu = e.clamp.relu ? std::optional<std::string_view>("relu") : std::nullopt;
  return binary_op()->call(x, e.residual, w, bias, o.padding, o.stride, o.dilation, o.groups, "add", at::Scalar(1),
                           relu, Scalars(), "");
}

}  // namespace bap_kernels
