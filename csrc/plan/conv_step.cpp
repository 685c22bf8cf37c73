// See conv_step.h.
#include "plan/conv_step.h"

#include <ATen/ops/empty.h>

#include "backends/cpu/conv_bands.h"
#include "dispatch/choice.h"
#include "dispatch/gathered_conv2d.h"

namespace bap_kernels {
namespace {

OptionalTensor converted(const OptionalTensor& t, OptionalType type) {
  return type.has_value() && has_value(t) ? t->to(*type) : t;
}

template <size_t kCount>
std::array<c10::SymInt, kCount> symbolic(const std::array<int64_t, kCount>& values) {
  std::array<c10::SymInt, kCount> all;
  std::copy(values.begin(), values.end(), all.begin());
  return all;
}

}  // namespace

void ConvStep::operator()(Slots& slots) const {
  const at::Tensor input = bap_kernels::converted(*slots[x], type),
                   filters = bap_kernels::converted(*slots[weight], type);
  const OptionalTensor added = converted(slots[bias], type);
  const OptionalTensor& other = residual.has_value() ? slots[*residual] : kAbsent;
  const auto strides = symbolic(stride), dilations = symbolic(dilation);
  const auto sides = symbolic(padding);
  const Fusion fusion{in_scale, in_shift, in_relu, out_scale, out_shift, other, out_relu};
  auto [result, again] =
      call<GatheredConv2dFused>({{input, filters, added, in_index, out_index, strides, sides, dilations, groups},
                                 fusion,
                                 /*cache_packed=*/true,
                                 weight_index,
                                 second_index,
                                 out_max});
  slots[out] = std::move(result);
  if (second.has_value()) slots[*second] = std::move(again);
}

GatheredConv2dFusedArgs<int64_t> ConvStep::args(const at::Tensor& input, const Slots& slots) const {
  const OptionalTensor& other = residual.has_value() ? slots[*residual] : kAbsent;
  const Fusion fusion{in_scale, in_shift, in_relu, out_scale, out_shift, other, out_relu};
  return {{input, *slots[weight], slots[bias], in_index, out_index, stride, padding, dilation, groups},
          fusion,
          /*cache_packed=*/true,
          weight_index,
          second_index,
          out_max};
}

at::Tensor ConvStep::unwritten_result(const at::Tensor& input, const Slots& slots) const {
  const auto shape = check_gathered_conv2d_fused<int64_t>(GatheredConv2dFused::kName, args(input, slots));
  return at::empty({shape.batch, shape.kept_out, shape.out_h, shape.out_w},
                   input.options().memory_format(input.suggest_memory_format()));
}

void BlockStep::run_layers(Slots& slots) const {
  for (const auto* step : {&first, &depthwise, &last}) (**step)(slots);
  slots[first->out].reset();
  slots[depthwise->out].reset();
}

bool BlockStep::takes_bands(const BlockCalls& calls, const Slots& slots) const {
  if (!bands_cover(calls)) return false;
  if (backend_is_named() || !auto_measures()) return bands_expected(calls);
  if (!bands_promise(calls)) return false;
  const MeasuredDevice& cpu = measured_device(calls.first.input);
  const auto text = [&] { return case_text(calls, cpu); };
  const auto candidates = [] { return std::vector<Candidate>{Candidate::kLayers, Candidate::kBands}; };
  const auto run_layers_on = [&](const at::Tensor& input) {
    Slots own = slots;
    own[first->x] = input;
    run_layers(own);
  };
  const auto run = [&](const at::Tensor& input, Candidate candidate) {
    if (candidate == Candidate::kLayers) return run_layers_on(input);
    conv_bands({calls.first.with_input(input), calls.depthwise, calls.last});
  };
  const auto measure_layers = [&] { run_layers_on(calls.first.input); };
  const MeasuredCase c{case_key(calls, cpu), text, calls.first.input, candidates, run, measure_layers};
  return ChoiceTable::instance().choose(c, cpu) == Candidate::kBands;
}

void BlockStep::operator()(Slots& slots) const {
  const at::Tensor& input = *slots[first->x];
  const bool plain = !first->type.has_value() && !depthwise->type.has_value() && !last->type.has_value();
  if (plain && input.suggest_memory_format() == at::MemoryFormat::ChannelsLast) {
    const at::Tensor hidden = first->unwritten_result(input, slots);
    const at::Tensor filtered = depthwise->unwritten_result(hidden, slots);
    const auto a = first->args(input, slots), b = depthwise->args(hidden, slots), c = last->args(filtered, slots);
    const FusedCall of_first(a), of_depthwise(b), of_last(c);
    const BlockCalls calls{of_first.call, of_depthwise.call, of_last.call};
    if (takes_bands(calls, slots)) {
      slots[last->out] = conv_bands(calls);
      return;
    }
  }
  run_layers(slots);
}

}  // namespace bap_kernels
