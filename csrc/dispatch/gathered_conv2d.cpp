// The gathered convolution on every device: checks, then the backend that is named, or that measured fastest. Lists on
// the CPU are copied first, so that what is checked is what the kernels read; those on a GPU are not read here.
#include "dispatch/gathered_conv2d.h"

#include <ATen/ops/index_select.h>

#include "dispatch/automatic.h"
#include "dispatch/packed_memory.h"
#include "dispatch/stream.h"
#include "ops/fusion.h"

namespace bap_kernels {

namespace {

struct AutomaticForward {
  using Call = ConvCall;
  using Result = at::Tensor;
  static constexpr auto kFamilies = &Backend::forward_families;
  static std::vector<Candidate> aten(const ConvCall& c) {
    std::vector<Candidate> candidates;
    backend(BackendId::kAten).add_candidates(c, c10::kCUDA, candidates);
    return candidates;
  }
  static at::Tensor run(const ConvCall& c, Candidate candidate, const char* op) {
    return run_candidate(c, candidate, op);
  }
  static void reset(const ConvCall& c) {
    if (c.dual_store != nullptr) c.dual_store->reset();
  }
};

struct AutomaticBackward {
  using Call = ConvBackwardCall;
  using Result = GradientTriple;
  static constexpr auto kFamilies = &Backend::backward_families;
  static std::vector<Candidate> aten(const ConvBackwardCall&) { return {Candidate::kGather}; }
  static GradientTriple run(const ConvBackwardCall& c, Candidate candidate, const char*) {
    return backend(backend_of(candidate)).backward(c);
  }
  static void reset(const ConvBackwardCall&) {}
};

}  // namespace

at::Tensor run_gathered_conv2d(const ConvCall& c, const char* op) {
  if (c.trivial()) return trivial_result(c);
  if (const Backend* named = named_backend(c.input)) return named->forward(c, op);
  if (!auto_measures()) return heuristic_backend(c).forward(c, op);
  if (on_gpu(c.input)) return run_automatically<AutomaticForward>(c, op);
  const MeasuredDevice& cpu = measured_device(c.input);
  const auto text = [&] { return case_text(c, cpu); };
  const auto candidates = [&] {
    std::vector<Candidate> list;
    backend(BackendId::kNative).add_candidates(c, c10::kCPU, list);
    // ATen's packed weights are those of one list.
    const bool one_weight = packed_memory() == PackedMemory::kShared && serves_all_lists(c, 0);
    if (list.empty() || !one_weight) backend(BackendId::kAten).add_candidates(c, c10::kCPU, list);
    return list;
  };
  const auto run = [&](const at::Tensor& input, Candidate candidate) {
    run_candidate(c.with_input(input), candidate, op);
  };
  return run_candidate(c, ChoiceTable::instance().choose({case_key(c, cpu), text, c.input, candidates, run}, cpu), op);
}

const Backend& backward_backend(const at::Tensor& input, const ConvShape<int64_t>& shape) {
  const Backend& native = backend(BackendId::kNative);
  const bool covered = input.is_cpu() && native.backward_unsupported_reason(input, shape).empty();
  return covered ? native : backend(BackendId::kAten);
}

namespace {

at::Tensor forward(const GatheredConv2dArgs<int64_t>& a) {
  const char* op = GatheredConv2d::kName;
  const ListCopy in_list(a.in_index), out_list(a.out_index);
  const auto args = a.with_lists(in_list.get(), out_list.get());
  const ConvCall call{{args, {}, a.cache_packed}, check_conv<int64_t>(op, args)};
  const auto& s = call.shape;
  check_list_values(op, call.in_index, call.out_index, s.channels_in, s.channels_out, s.depthwise);
  pin_for_graph(call.weight, {&call.in_index, &call.out_index});
  return run_gathered_conv2d(call, op);
}

at::Tensor selected_store(const at::Tensor& result, const at::Tensor& index, at::MemoryFormat format) {
  if (format != at::MemoryFormat::ChannelsLast) return result.index_select(1, index);
  // index_select would return it without its memory format.
  return result.permute({0, 2, 3, 1}).index_select(3, index).permute({0, 3, 1, 2});
}

DualResult fused(const GatheredConv2dFusedArgs<int64_t>& a) {
  const char* op = GatheredConv2dFused::kName;
  at::Tensor second;
  FusedCall checked(a);
  ConvCall& call = checked.call;
  const auto& s = call.shape;
  // Kernels for GPUs end with the ReLU.
  const bool limits_later = call.out_max.has_value() && (!call.input.is_cpu() || named_opt_in_backend() != nullptr);
  if (limits_later) call.out_max.reset();
  const bool dual = has_value(call.dual_store_index);
  if (dual) {
    check_list_values(op, "dual_store_index", call.dual_store_index, s.kept_out);
    call.dual_store = &second;
  }
  at::Tensor result = run_gathered_conv2d(call, op);
  if (limits_later) result.clamp_max_(*a.out_max);
  if (limits_later && second.defined()) second.clamp_max_(*a.out_max);
  if (!dual) return {std::move(result), second};
  if (!second.defined()) second = selected_store(result, *call.dual_store_index, call.format());
  return {std::move(result), std::move(second)};
}

GradientTriple backward(const GatheredConv2dBackwardArgs<int64_t>& a) {
  const char* op = GatheredConv2dBackward::kName;
  const ListCopy in_list(a.in_index), out_list(a.out_index);
  const auto args = a.with_lists(in_list.get(), out_list.get());
  const ConvBackwardCall call{args, check_gathered_conv2d_backward<int64_t>(op, args)};
  const auto& s = call.shape;
  check_list_values(op, call.in_index, call.out_index, s.channels_in, s.channels_out, s.depthwise);
  pin_for_graph(call.weight, {&call.in_index, &call.out_index});
  if (s.trivial()) return backend(BackendId::kAten).backward(call);
  if (const Backend* named = named_backend(call.input)) return named->backward(call);
  if (on_gpu(call.input)) return run_automatically<AutomaticBackward>(call, op);
  return backward_backend(call.input, s).backward(call);
}

void implement_ops(torch::Library& m) {
  implement<GatheredConv2d, forward>(m);
  implement<GatheredConv2dFused, fused>(m);
  implement<GatheredConv2dBackward, backward>(m);
}

}  // namespace

FusedCall::FusedCall(const GatheredConv2dFusedArgs<int64_t>& a)
    : in_list_(a.in_index),
      out_list_(a.out_index),
      weight_list_(a.weight_index),
      dual_list_(a.dual_store_index),
      args_{a.with_lists(in_list_.get(), out_list_.get()),
            a.fusion,
            a.cache_packed,
            weight_list_.get(),
            dual_list_.get(),
            a.out_max},
      call{args_, check_gathered_conv2d_fused<int64_t>(GatheredConv2dFused::kName, args_)} {
  const char* op = GatheredConv2dFused::kName;
  const auto& s = call.shape;
  check_list_values(op, call.in_index, call.out_index, s.channels_in, s.channels_out, s.depthwise);
  check_list_values(op, "weight_index", call.weight_index, call.weight.size(1));
  pin_for_graph(call.weight, {&call.in_index, &call.out_index, &call.weight_index, &call.dual_store_index});
}

TORCH_LIBRARY_IMPL(bap_kernels, CPU, m) { implement_ops(m); }
TORCH_LIBRARY_IMPL(bap_kernels, CUDA, m) { implement_ops(m); }

}  // namespace bap_kernels
