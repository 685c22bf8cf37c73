// Measured choice of a backend, its file, and the user's setting.
#include "cpu/choice.h"

#include <ATen/Parallel.h>
#include <c10/util/irange.h>
#include <torch/version.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <limits>
#include <mutex>
#include <random>
#include <sstream>
#include <unordered_map>

#include "aten/packed_convolution.h"
#include "cpu/isa.h"
#include "cpu/packed_cache.h"

namespace bap_kernels {
namespace {

// A first line that any other content of the file would not have; the version changes with the meaning of a line.
constexpr const char* kFileHead = "bap_kernels choices v4";
// Measured with fewer routes, or in an order that favoured some of them: begun anew.
constexpr const char* kOldFileHeads[] = {"bap_kernels choices v1", "bap_kernels choices v2", "bap_kernels choices v3"};
// A backend must win by this much to be preferred to one before it: less is noise.
constexpr double kMargin = 0.97;
// What is slower than the fastest by this factor after kMinRounds leaves its time to the others.
constexpr double kHopeless = 1.25;
constexpr int kMinRounds = 8, kMaxRounds = 32;
constexpr double kSecondsPerCase = 0.1;
// Inputs that measuring goes through: more than inner caches hold, and copied in some 10 ms.
constexpr int64_t kPoolBytes = int64_t{32} << 20, kMostInputs = 64;

using Run = c10::function_ref<void(const ConvCall&, Route)>;

double wall_seconds(c10::function_ref<void()> run) {
  const auto start = std::chrono::steady_clock::now();
  run();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// The input and copies of it, to be used in turn: within a network a layer finds its input in an outer cache at best,
// but the second candidate to read one tensor would find it in the inner ones.
std::vector<at::Tensor> input_pool(const at::Tensor& input) {
  std::vector<at::Tensor> pool = {input};
  const int64_t bytes = std::max<int64_t>(1, static_cast<int64_t>(input.nbytes()));
  // A copy of a tensor with gaps would lie otherwise in memory.
  if (!input.is_non_overlapping_and_dense()) return pool;
  const int64_t count = std::min(kMostInputs, (kPoolBytes + bytes - 1) / bytes);
  while (static_cast<int64_t>(pool.size()) < count) pool.push_back(input.clone());
  return pool;
}

// Less than half of the time may be undisturbed, and a single run may be quicker than any other ever was.
double lower_quartile(std::vector<double> values) {
  const auto place = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 4);
  std::nth_element(values.begin(), place, values.end());
  return *place;
}

// Lower quartile of the runs of each candidate, in seconds; 0 for the other routes. Every round has an order of its
// own: what ran before leaves its tensors in the caches, and a candidate that always follows the same one gains or
// loses by it.
std::array<double, kRouteCount> measure(const ConvCall& c, const Place& place, std::vector<Route> candidates, Run run) {
  std::array<std::vector<double>, kRouteCount> samples;
  std::array<double, kRouteCount> seconds{};
  const std::vector<at::Tensor> inputs = input_pool(c.input);
  size_t turn = 0;
  const auto timed = [&](Route r) {
    const at::Tensor& input = inputs[turn++ % inputs.size()];
    const ConvCall call{input,      c.weight, c.bias,         c.in_index, c.out_index, c.stride,      c.padding,
                        c.dilation, c.groups, c.cache_packed, c.shape,    c.fusion,    c.weight_index};
    return place.seconds(r, [&] { run(call, r); });
  };
  // A copy that a candidate leaves is not that of the one which is taken.
  ConvCall plain = c;
  plain.copy = nullptr;
  const auto declines = [&](Route r) {
    try {
      run(plain, r);  // packs weights, warms caches and thread pools
      return false;
    } catch (const c10::NotImplementedError&) {
      return true;
    }
  };
  candidates.erase(std::remove_if(candidates.begin(), candidates.end(), declines), candidates.end());
  std::minstd_rand random(1);
  double spent = 0;
  for (int round = 0; round < kMaxRounds && (round < kMinRounds || spent < kSecondsPerCase); ++round) {
    std::shuffle(candidates.begin(), candidates.end(), random);
    for (const Route r : candidates) {
      samples[static_cast<int>(r)].push_back(timed(r));
      spent += samples[static_cast<int>(r)].back();
    }
    if (round + 1 < kMinRounds) continue;
    double fastest = std::numeric_limits<double>::max();
    for (const Route r : candidates) {
      seconds[static_cast<int>(r)] = lower_quartile(samples[static_cast<int>(r)]);
      fastest = std::min(fastest, seconds[static_cast<int>(r)]);
    }
    const auto hopeless = [&](Route r) { return seconds[static_cast<int>(r)] > kHopeless * fastest; };
    candidates.erase(std::remove_if(candidates.begin(), candidates.end(), hopeless), candidates.end());
    if (candidates.size() == 1) break;
  }
  return seconds;
}

// Identifies the machine and the software that a measurement holds for.
const std::string& fingerprint() {
  static const std::string text = cpu_model() + "|" + isa() + "|torch " TORCH_VERSION;
  return text;
}

// Whether memory order is the format's own, or strided in some other way.
const char* layout_name(const ConvCall& c) {
  if (c.format() == at::MemoryFormat::ChannelsLast) return c.input.is_contiguous(c.format()) ? "nhwc" : "nhwc-strided";
  return c.input.is_contiguous() ? "nchw" : "nchw-strided";
}

}  // namespace

const Place& cpu_place() {
  static const auto* place =
      new Place{"", 0, [] { return true; }, [](Route, c10::function_ref<void()> run) { return wall_seconds(run); }};
  return *place;
}

int32_t place_id(const std::string& name) {
  return name.empty() ? 0 : static_cast<int32_t>(std::hash<std::string>()(name) | 1);
}

const char* route_name(Route route) {
  constexpr const char* kNames[kRouteCount] = {"native", "gather", "gather_flat", "gather_packed",
                                               "dense",  "masked", "cuda",        "triton"};
  return kNames[static_cast<int>(route)];
}

std::string case_key(const ConvCall& c, const Place& place) {
  const auto& s = c.shape;
  std::ostringstream key;
  key << c10::toString(c.input.scalar_type()) << ' ' << layout_name(c) << " n" << s.batch << " c" << s.channels_in
      << ':' << (has_value(c.in_index) ? std::to_string(s.kept_in) : "all") << " k" << s.channels_out << ':'
      << (has_value(c.out_index) ? std::to_string(s.kept_out) : "all") << ' ' << s.height << 'x' << s.width << " f"
      << s.kernel_h << 'x' << s.kernel_w << " s" << c.stride[0] << 'x' << c.stride[1] << " p" << c.padding[0] << ','
      << c.padding[1] << ',' << c.padding[2] << ',' << c.padding[3] << " d" << c.dilation[0] << 'x' << c.dilation[1]
      << " g" << c.groups << (has_value(c.bias) ? " bias" : "") << (c.fusion.has_prologue() ? " pre" : "")
      << (c.fusion.has_epilogue() ? " post" : "") << (PackedCache::keeps(c) ? " cached" : "")
      << (onednn_enabled() ? "" : " no-onednn");
  if (place.name.empty()) {
    key << " t" << at::get_num_threads();
  } else {
    key << " on " << place.name;
  }
  return key.str();
}

namespace {

// The same facts as case_key in a form that costs no allocation to build.
struct FastKey {
  std::array<int32_t, 28> v{};
  bool operator==(const FastKey& o) const { return v == o.v; }
};

struct FastHash {
  size_t operator()(const FastKey& k) const {
    uint64_t h = 0x9e3779b97f4a7c15ull;
    for (const int32_t x : k.v) h = (h ^ static_cast<uint32_t>(x)) * 0xff51afd7ed558ccdull, h ^= h >> 32;
    return h;
  }
};

FastKey fast_key(const ConvCall& c, const Place& place) {
  const auto& s = c.shape;
  const bool last = c.format() == at::MemoryFormat::ChannelsLast;
  const int32_t flags = (last ? 1 : 0) | (c.input.is_contiguous(c.format()) ? 2 : 0) | (has_value(c.in_index) ? 4 : 0) |
                        (has_value(c.out_index) ? 8 : 0) | (has_value(c.bias) ? 16 : 0) |
                        (c.fusion.has_prologue() ? 32 : 0) | (c.fusion.has_epilogue() ? 64 : 0) |
                        (PackedCache::keeps(c) ? 128 : 0) | (onednn_enabled() ? 256 : 0);
  const int64_t values[] = {s.batch,
                            s.channels_in,
                            s.height,
                            s.width,
                            s.channels_out,
                            s.kernel_h,
                            s.kernel_w,
                            s.kept_in,
                            s.kept_out,
                            c.stride[0],
                            c.stride[1],
                            c.padding[0],
                            c.padding[1],
                            c.padding[2],
                            c.padding[3],
                            c.dilation[0],
                            c.dilation[1],
                            c.groups,
                            flags,
                            static_cast<int64_t>(c.input.scalar_type()),
                            place.name.empty() ? at::get_num_threads() : 0,
                            place.id};
  FastKey key;
  size_t i = 0;
  for (const int64_t v : values) key.v[i++] = static_cast<int32_t>(v);
  return key;
}

}  // namespace

struct ChoiceTable::State {
  std::mutex mutex;
  std::unordered_map<FastKey, Route, FastHash> routes;
  std::unordered_map<std::string, Choice> choices;
  std::string path;
  bool loaded = true;

  // Reads the lines of this machine: fingerprint, case, route, microseconds, tab-separated.
  void load() {
    loaded = true;
    std::ifstream file(path);
    if (!file) return;
    std::string line;
    int64_t bad = 0;
    if (!std::getline(file, line)) return;  // an empty file is a new one
    if (std::find(std::begin(kOldFileHeads), std::end(kOldFileHeads), line) != std::end(kOldFileHeads)) {
      file.close();
      std::ofstream(path, std::ios::trunc).flush();
      return;
    }
    const bool known = line == kFileHead;
    while (known && std::getline(file, line)) {
      if (line.empty() || line == kFileHead) continue;  // two processes may have begun the file at once
      std::istringstream fields(line);
      std::string machine, key, route, times;
      Choice choice{};
      bool good = std::getline(fields, machine, '\t') && std::getline(fields, key, '\t') &&
                  std::getline(fields, route, '\t') && std::getline(fields, times, '\t');
      int number = -1;
      for (const auto r : c10::irange(kRouteCount)) {
        if (route == route_name(static_cast<Route>(r))) number = r;
      }
      std::istringstream numbers(times);
      for (double& t : choice.seconds) {
        double microseconds = 0;
        good = good && static_cast<bool>(numbers >> microseconds) && microseconds >= 0;
        t = microseconds * 1e-6;
      }
      if (!good || number < 0) {
        ++bad;
        continue;
      }
      if (machine != fingerprint()) continue;
      choice.key = key;
      choice.route = static_cast<Route>(number);
      choices[key] = choice;
    }
    if (!known || bad > 0) {
      TORCH_WARN("bap_kernels: expected `", path, "` to hold measured choices, got ",
                 known ? std::to_string(bad) + " unreadable lines" : std::string("another kind of file"),
                 "; these are ignored and measured again.");
    }
    if (!known) path.clear();  // not our file: it is left as it is
  }

  void append(const Choice& choice) {
    if (path.empty()) return;
    std::error_code ignored;
    std::filesystem::create_directories(std::filesystem::path(path).parent_path(), ignored);
    std::ifstream before(path, std::ios::ate | std::ios::binary);
    const std::streamoff size = before ? static_cast<std::streamoff>(before.tellg()) : 0;
    std::ostringstream line;
    if (size == 0) line << kFileHead << '\n';
    // A line that was cut short by a crash must not swallow this one.
    if (size > 0 && (before.seekg(size - 1), before.get() != '\n')) line << '\n';
    line << fingerprint() << '\t' << choice.key << '\t' << route_name(choice.route) << '\t';
    for (const double t : choice.seconds) line << t * 1e6 << ' ';
    line << '\n';
    std::ofstream file(path, std::ios::app);
    file << line.str() << std::flush;
    if (!file) path.clear();  // a read-only place: choices stay in memory
  }
};

ChoiceTable::ChoiceTable() : state_(new State()) {}

ChoiceTable& ChoiceTable::instance() {
  static auto* table = new ChoiceTable();
  return *table;
}

Route ChoiceTable::choose(const ConvCall& call, const Place& place, c10::function_ref<std::vector<Route>()> list,
                          c10::function_ref<void(const ConvCall&, Route)> run) {
  const FastKey fast = fast_key(call, place);
  std::vector<Route> candidates;
  {
    std::lock_guard<std::mutex> lock(state_->mutex);
    const auto found = state_->routes.find(fast);
    if (found != state_->routes.end()) return found->second;
  }
  // Outside the lock: it may ask Python, whose lock another thread may hold while it waits for this one.
  candidates = list();
  {
    std::lock_guard<std::mutex> lock(state_->mutex);
    if (!state_->loaded) state_->load();
    const auto known = state_->choices.find(case_key(call, place));
    if (known != state_->choices.end() &&
        std::find(candidates.begin(), candidates.end(), known->second.route) != candidates.end()) {
      state_->routes[fast] = known->second.route;
      return known->second.route;
    }
  }
  Choice choice{case_key(call, place), candidates.front(), {}};
  if (candidates.size() > 1) {
    if (!place.may_measure()) return candidates.front();
    const PackedCache::Trial trial;  // those that lose need no packed weights
    choice.seconds = measure(call, place, candidates, run);
    for (const Route r : candidates) {
      const double best = choice.seconds[static_cast<int>(choice.route)];
      const double own = choice.seconds[static_cast<int>(r)];
      if (own > 0 && own < best * kMargin) choice.route = r;
    }
  }
  std::lock_guard<std::mutex> lock(state_->mutex);
  state_->routes[fast] = choice.route;
  state_->choices[choice.key] = choice;
  if (candidates.size() > 1) state_->append(choice);
  return choice.route;
}

const Choice* ChoiceTable::find(const std::string& key) {
  std::lock_guard<std::mutex> lock(state_->mutex);
  const auto found = state_->choices.find(key);
  return found == state_->choices.end() ? nullptr : &found->second;
}

std::vector<Choice> ChoiceTable::all() {
  std::lock_guard<std::mutex> lock(state_->mutex);
  if (!state_->loaded) state_->load();
  std::vector<Choice> result;
  for (const auto& item : state_->choices) result.push_back(item.second);
  std::sort(result.begin(), result.end(), [](const Choice& a, const Choice& b) { return a.key < b.key; });
  return result;
}

void ChoiceTable::clear() {
  std::lock_guard<std::mutex> lock(state_->mutex);
  state_->routes.clear();
  state_->choices.clear();
  state_->loaded = true;
}

void ChoiceTable::set_file(const std::string& path) {
  std::lock_guard<std::mutex> lock(state_->mutex);
  state_->path = path;
  state_->loaded = path.empty();
}

}  // namespace bap_kernels
