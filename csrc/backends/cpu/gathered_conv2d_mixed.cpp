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

namespace bap_kernels {
namespace {

// One call prepared for the native kernels; it stays where it is, as its tasks refer to it.
struct NativeRun {
  NativeCall native;
  at::Tensor weight;
  NativeTasks tasks;
};

bool same_list(const OptionalTensor& a, const OptionalTensor& b) {
  if (!has_value(a) || !has_value(b)) return has_value(a) == has_value(b);
  const auto one = a->expect_contiguous(), other = b->expect_contiguous();
  return one->numel() == other->numel() &&
         std::equal(one->const_data_ptr<int32_t>(), one->const_data_ptr<int32_t>() + one->numel(),
                    other->const_data_ptr<int32_t>());
}

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

// Samples of a run's input before those of another.
int64_t samples_before(const MixedRun& first, const MixedRun& run) {
  return (run.output.storage_offset() - first.output.storage_offset()) / first.output.stride(0);
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
    // Of one run; `images` are those of the list's other runs, which are computed with it.
    const auto add = [&](const MixedRun& part, std::vector<int64_t> images) {
      ConvCall call = c.call(part);
      at::Tensor output = part.output;
      runs.push_back({prepare_native(call, output), {}, {}});
      NativeRun& p = runs.back();
      if (many) p.native.threads = 1;
      const int64_t size = unmeasured_winograd(p.native, /*weight_is_kept=*/true);
      if (size != 0 && !images.empty()) {
        call.shape.batch = p.native.batch = static_cast<int64_t>(images.size());
        p.native.images = std::move(images);
      }
      p.weight = size ? packed_winograd_weight(call, p.native, size) : packed_weight(call, p.native);
      const auto* w = p.weight.const_data_ptr<float>();
      const bool last = call.format() == at::MemoryFormat::ChannelsLast;
      p.tasks = size   ? conv_winograd_tasks(p.native, w, size, last)
                : last ? conv_nhwc_tasks(p.native, w)
                       : conv_nchw_tasks(p.native, w);
      const double work = static_cast<double>(p.native.pixels() * p.native.depth) / static_cast<double>(p.tasks.count);
      for (const auto number : c10::irange(p.tasks.count)) tasks.push_back({0, work, &p, number});
      return size != 0;
    };
    std::vector<int64_t> images;
    for (const MixedRun* run : group) {
      const int64_t before = samples_before(*group.front(), *run);
      for (const auto i : c10::irange(run->input.size(0))) images.push_back(before + i);
    }
    if (!add(*group.front(), std::move(images))) {
      for (auto run = group.begin() + 1; run != group.end(); ++run) add(**run, {});
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
