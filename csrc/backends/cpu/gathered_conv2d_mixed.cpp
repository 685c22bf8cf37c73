// The gathered convolution of mixed batches on CPUs: the runs of all domains as one pool of tasks. Tasks are those of
// each run by itself, so a sample's result does not depend on what else is in the batch. The heaviest are taken first,
// by whichever thread is free.
#include <ATen/Parallel.h>
#include <c10/util/irange.h>

#include <algorithm>
#include <atomic>
#include <deque>

#include "backends/cpu/native.h"
#include "backends/cpu/native_call.h"
#include "backends/cpu/winograd.h"

namespace bap_kernels {
namespace {

// One call prepared for the native kernels; it stays where it is, as its tasks refer to it.
struct NativeRun {
  NativeCall native;
  at::Tensor weight;
  NativeTasks tasks;
  double work;  // multiplications in one task
};

}  // namespace

void native_gathered_conv2d_mixed(const MixedCall& c, const char*) {
  const int threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  std::deque<NativeRun> runs;
  struct Task {
    double work;
    const NativeRun* call;
    int64_t number;
  };
  std::vector<Task> tasks;
  for (const MixedRun& part : c.runs) {
    const ConvCall call = c.call(part);
    at::Tensor output = part.output;
    runs.push_back({prepare_native(call, output), {}, {}, 0});
    NativeRun& p = runs.back();
    // With runs enough for all threads a weight is read once for each run.
    if (static_cast<int>(c.runs.size()) >= 2 * threads) p.native.threads = 1;
    const int64_t size = unmeasured_winograd(p.native, /*weight_is_kept=*/true);
    p.weight = size ? packed_winograd_weight(call, p.native, size) : packed_weight(call, p.native);
    const auto* w = p.weight.const_data_ptr<float>();
    const bool last = call.format() == at::MemoryFormat::ChannelsLast;
    p.tasks = size   ? conv_winograd_tasks(p.native, w, size, last)
              : last ? conv_nhwc_tasks(p.native, w)
                     : conv_nchw_tasks(p.native, w);
    p.work = static_cast<double>(p.native.pixels()) * p.native.depth / static_cast<double>(p.tasks.count);
    for (const auto number : c10::irange(p.tasks.count)) tasks.push_back({p.work, &p, number});
  }
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.work > b.work; });
  std::atomic<size_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (size_t i = next++; i < tasks.size(); i = next++) tasks[i].call->tasks.run(tasks[i].number);
  });
}

}  // namespace bap_kernels
