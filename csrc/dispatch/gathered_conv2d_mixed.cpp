// The gathered convolution of mixed batches on every device: all runs at once by the named backend or the CPU kernels,
// and those that they do not cover as calls of their own. On a CPU a batch of one list is an ordinary call.
#include <c10/util/irange.h>

#include <algorithm>
#include <deque>
#include <map>

#include "dispatch/automatic.h"
#include "dispatch/gathered_conv2d.h"
#include "dispatch/list_copy.h"
#include "dispatch/stream.h"
#include "ops/fusion.h"
#include "ops/listed_channels.h"

namespace bap_kernels {
namespace {

// Whether the CPU kernels compute the runs of a list.
bool native_covers(const MixedCall& c, const OptionalTensor& list) {
  const ConvCall part = c.call(c.input, list, c.shape.batch);
  return !part.trivial() && backend(BackendId::kNative).unsupported_reason(part).empty();
}

at::Tensor mixed_on_cpu(MixedCall& c, const Backend* named, const char* op) {
  const auto of_first = [&](const MixedRun& run) { return same_list(run.in_index, c.runs.front().in_index); };
  if (!c.runs.empty() && std::all_of(c.runs.begin(), c.runs.end(), of_first)) {
    return run_gathered_conv2d(c.call(c.input, c.runs.front().in_index, c.shape.batch), op);
  }
  const Backend& native = backend(BackendId::kNative);
  const bool together = named == nullptr || named == &native;
  MixedCall covered{c, c.shape, c.output, {}};
  std::map<int64_t, bool> by_length;  // what counts of a list
  for (MixedRun& run : c.runs) {
    const int64_t length = has_value(run.in_index) ? run.in_index->size(0) : -1;
    const auto [known, fresh] = by_length.try_emplace(length, false);
    if (fresh) known->second = together && native_covers(c, run.in_index);
    if (known->second) {
      covered.runs.push_back(run);
    } else {
      c.cut(run);
      run.output.copy_(run_gathered_conv2d(c.call(run), op));
    }
  }
  if (!covered.runs.empty()) native.mixed(covered, op);
  return c.output;
}

// The runs one after the other.
void mixed_by_aten(const MixedCall& c, const char* op) {
  for (const MixedRun& run : c.runs) {
    const ConvCall part = c.call(run);
    run.output.copy_(part.trivial() ? trivial_result(part) : backend(BackendId::kAten).forward(part, op));
  }
}

struct AutomaticMixed {
  using Call = MixedCall;
  using Result = at::Tensor;
  static constexpr auto kFamilies = &Backend::mixed_families;
  static std::vector<Candidate> aten(const MixedCall&) { return {Candidate::kGather}; }
  // The output is ours until the call returns: the next candidate overwrites all of it.
  static at::Tensor run(const MixedCall& c, Candidate candidate, const char* op) {
    const BackendId id = backend_of(candidate);
    id == BackendId::kAten ? mixed_by_aten(c, op) : backend(id).mixed(c, op);
    return c.output;
  }
  static void reset(const MixedCall&) {}
};

at::Tensor mixed(const GatheredConv2dMixedArgs<int64_t>& a) {
  const char* op = GatheredConv2dMixed::kName;
  std::deque<ListCopy> copies;
  OptionalTensorList lists;
  for (const auto i : c10::irange(a.in_indices.size())) {
    copies.emplace_back(a.in_indices.get(i));
    lists.push_back(copies.back().get());
  }
  const auto args = a.with_lists(lists);
  MixedCall call{args, check_gathered_conv2d_mixed<int64_t>(op, args)};
  const auto& s = call.shape;
  call.output = at::empty({s.batch, s.channels_out, s.out_h, s.out_w},
                          a.input.options().memory_format(a.input.suggest_memory_format()));
  int64_t first = 0;
  for (const auto i : c10::irange(a.counts.size())) {
    const OptionalTensor list = lists.get(i);
    check_list_values(op, "in_index", list, s.channels_in);
    pin_for_graph(a.weight, {&list});
    const int64_t count = a.counts[i];
    if (count > 0) call.runs.push_back({{}, {}, list, first, count});
    first += count;
  }
  const Backend* named = named_backend(a.input);
  const bool opt_in = named != nullptr && named->opt_in;
  if (!opt_in && !on_gpu(a.input)) return mixed_on_cpu(call, named, op);
  for (MixedRun& run : call.runs) call.cut(run);
  if (opt_in) {
    named->mixed(call, op);
    return call.output;
  }
  if (named == nullptr && !call.runs.empty() && call.output.numel() > 0) {
    return run_automatically<AutomaticMixed>(call, op);
  }
  mixed_by_aten(call, op);
  return call.output;
}

}  // namespace

TORCH_LIBRARY_IMPL(bap_kernels, CPU, m) { implement<GatheredConv2dMixed, mixed>(m); }
TORCH_LIBRARY_IMPL(bap_kernels, CUDA, m) { implement<GatheredConv2dMixed, mixed>(m); }

}  // namespace bap_kernels
