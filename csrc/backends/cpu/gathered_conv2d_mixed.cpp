// The gathered convolution of mixed batches on CPUs: the runs of all domains as one pool of tasks. A sample's result
// does not depend on what else is in the batch: direct convolutions have the tasks of each run by itself, and those of
// Winograd, which go through all samples of a domain, compute a sample alike in any of them. The heaviest domains are
// taken first, by whichever thread is free, one domain after the other, so that its weights stay near.
#include <ATen/Parallel.h>
#include <c10/util/irange.h>

#include <algorithm>
#include <atomic>
#include <deque>

#include "backends/cpu/native.h"
#include "backends/cpu/native_call.h"
#include "backends/cpu/winograd.h"
#include "ops/listed_channels.h"

namespace bap_kernels {
namespace {

// Tasks of one call prepared for the native kernels; it stays where it is, as they refer to it.
struct NativeRun {
  NativeCall native;
  at::Tensor weight;
  NativeTasks tasks;
};

// The runs of each list, in the order of the batch.
std::vector<std::vector<const MixedRun*>> runs_by_list(const MixedCall& c) {
  std::vector<std::vector<const MixedRun*>> groups;
  for (const MixedRun& run : c.runs) {
    const auto same = [&](const auto& group) { return same_list(group.front()->in_index, run.in_index); };
    const auto group = std::find_if(groups.begin(), groups.end(), same);
    group == groups.end() ? groups.push_back({&run}) : group->push_back(&run);
  }
  return groups;
}

// A list's call from sample `first` on.
NativeCall samples_of(const NativeCall& n, int64_t first, int64_t count) {
  NativeCall part = n;
  part.x += first * n.x_stride_n * n.element_size();
  part.y += first * n.out_h * n.out_w * n.kept_out * n.out_size();
  part.batch = count;
  return part;
}

}  // namespace

void native_gathered_conv2d_mixed(const MixedCall& c, const char*) {
  const int threads = free_threads();
  // With runs enough for all threads a weight is read once for each run.
  const bool many = static_cast<int>(c.runs.size()) >= 2 * threads;
  std::deque<NativeRun> runs;
  struct Task {
    double of_list, work;  // multiplications in the heaviest task of the list, and in this one
    const NativeRun* call;
    int64_t number;
  };
  std::vector<Task> tasks;
  for (const auto& group : runs_by_list(c)) {
    const size_t first_task = tasks.size();
    std::vector<int64_t> images;
    for (const MixedRun* run : group) {
      for (const auto i : c10::irange(run->count)) images.push_back(run->first + i);
    }
    // All samples of the list share one weight, and what is prepared besides.
    const ConvCall call = c.call(c.input, group.front()->in_index, static_cast<int64_t>(images.size()));
    at::Tensor output = c.output;
    NativeCall of_list = prepare_native(call, output);
    of_list.batch = call.shape.batch;
    if (many) of_list.threads = 1;
    const int64_t size = unmeasured_winograd(of_list, /*weight_is_kept=*/true);
    const at::Tensor weight = size ? packed_winograd_weight(call, of_list, size) : packed_weight(call, of_list);
    const auto* w = weight.const_data_ptr<float>();
    const bool last = call.format() == at::MemoryFormat::ChannelsLast;
    const auto add = [&](NativeCall native) {
      runs.push_back({std::move(native), weight, {}});
      NativeRun& p = runs.back();
      p.tasks = size   ? conv_winograd_tasks(p.native, w, size, last)
                : last ? conv_nhwc_tasks(p.native, w)
                       : conv_nchw_tasks(p.native, w);
      const double work = static_cast<double>(p.native.pixels() * p.native.depth) / static_cast<double>(p.tasks.count);
      for (const auto number : c10::irange(p.tasks.count)) tasks.push_back({0, work, &p, number});
    };
    if (size != 0) {
      of_list.images = std::move(images);
      add(std::move(of_list));
    } else {
      for (const MixedRun* run : group) add(samples_of(of_list, run->first, run->count));
    }
    double heaviest = 0;
    for (size_t i = first_task; i < tasks.size(); ++i) heaviest = std::max(heaviest, tasks[i].work);
    for (size_t i = first_task; i < tasks.size(); ++i) tasks[i].of_list = heaviest;
  }
  // Lists of equal weight stay together: they were added so.
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.of_list > b.of_list; });
  std::atomic<size_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (size_t i = next++; i < tasks.size(); i = next++) tasks[i].call->tasks.run(tasks[i].number);
  });
}

}  // namespace bap_kernels
