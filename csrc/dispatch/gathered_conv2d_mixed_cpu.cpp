// The gathered convolution of mixed batches on CPUs: the runs of all domains as one pool of tasks.
// Tasks are those of each run by itself, so a sample's result does not depend on what else is in the batch. The
// heaviest are taken first, by whichever thread is free.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <c10/util/irange.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <deque>

#include "backends/cpu/native.h"
#include "backends/cpu/native_call.h"
#include "dispatch/choice.h"
#include "dispatch/list_copy.h"
#include "dispatch/named_backend.h"
#include "dispatch/run_cpu.h"

namespace bap_kernels {
namespace {

// One call prepared for the native kernels; it stays where it is, as its tasks refer to it.
struct Prepared {
  NativeCall native;
  at::Tensor weight;
  NativeTasks tasks;
  double work;  // multiplications in one task
};

void run_native(const std::vector<ConvCall>& calls, const std::vector<at::Tensor>& outputs) {
  const int threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  std::deque<Prepared> prepared;
  struct Task {
    double work;
    const Prepared* call;
    int64_t number;
  };
  std::vector<Task> tasks;
  for (const auto i : c10::irange(calls.size())) {
    at::Tensor output = outputs[i];
    prepared.push_back({prepare_native(calls[i], output), {}, {}, 0});
    Prepared& p = prepared.back();
    // With runs enough for all threads a weight is read once for each run.
    if (static_cast<int>(calls.size()) >= 2 * threads) p.native.threads = 1;
    p.weight = packed_weight(calls[i], p.native);
    const auto* w = p.weight.const_data_ptr<float>();
    const bool last = calls[i].format() == at::MemoryFormat::ChannelsLast;
    p.tasks = last ? pixel_rows_tasks(p.native, w) : channel_rows_tasks(p.native, w);
    p.work = static_cast<double>(p.native.pixels()) * p.native.depth / static_cast<double>(p.tasks.count);
    for (const auto number : c10::irange(p.tasks.count)) tasks.push_back({p.work, &p, number});
  }
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.work > b.work; });
  std::atomic<size_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (size_t i = next++; i < tasks.size(); i = next++) tasks[i].call->tasks.run(tasks[i].number);
  });
}

at::Tensor gathered_conv2d_mixed_cpu(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                                     const OptionalTensorList& in_indices, c10::IntArrayRef counts,
                                     c10::IntArrayRef stride, c10::IntArrayRef padding, c10::IntArrayRef dilation,
                                     bool cache_packed) {
  const char* op = "_gathered_conv2d_mixed";
  std::vector<ListCopy> copies;
  c10::List<OptionalTensor> lists;
  for (const auto i : c10::irange(in_indices.size())) {
    copies.emplace_back(in_indices.get(i));
    lists.push_back(copies.back().get());
  }
  const auto shape =
      check_gathered_conv2d_mixed<int64_t>(op, input, weight, bias, lists, counts, stride, padding, dilation);
  const auto format = input.suggest_memory_format();
  at::Tensor output =
      at::empty({shape.batch, shape.channels_out, shape.out_h, shape.out_w}, input.options().memory_format(format));
  std::vector<MixedRun> runs;
  int64_t first = 0;
  for (const auto i : c10::irange(counts.size())) {
    const OptionalTensor list = lists.get(i);
    check_list_values(op, list, {}, shape.channels_in, shape.channels_out, false);
    if (counts[i] > 0) runs.push_back({input.narrow(0, first, counts[i]), output.narrow(0, first, counts[i]), list});
    first += counts[i];
  }
  std::vector<ConvCall> calls;
  std::vector<at::Tensor> outputs;
  const std::string& backend = get_backend();
  if (const NamedBackend* named = named_backend()) {
    for (const MixedRun& run : runs) {
      calls.push_back(mixed_run_call(run, weight, bias, stride, padding, dilation, cache_packed, shape));
    }
    named->mixed(output, runs, calls, input, op);
    return output;
  }
  for (const MixedRun& run : runs) {
    const ConvCall call = mixed_run_call(run, weight, bias, stride, padding, dilation, cache_packed, shape);
    // A run of one sample may be laid out in either way, and the result has the batch's.
    const bool native = (backend == "auto" || backend == "native") && !call.trivial() && native_why_not(call).empty() &&
                        call.format() == format && run.output.is_contiguous(format);
    if (native) {
      calls.push_back(call);
      outputs.push_back(run.output);
    } else {
      at::Tensor(run.output).copy_(run_cpu(call, op));
    }
  }
  run_native(calls, outputs);
  return output;
}

}  // namespace

TORCH_LIBRARY_IMPL(bap_kernels, CPU, m) { m.impl("_gathered_conv2d_mixed", gathered_conv2d_mixed_cpu); }

}  // namespace bap_kernels
