// Choice of the backend by measurement: each case once, kept in memory and in a file.
#pragma once

#include <c10/util/FunctionRef.h>

#include <array>
#include <atomic>
#include <functional>
#include <string>
#include <vector>

#include "ops/conv_call.h"

namespace bap_kernels {

// What can run a call: the first ones on a CPU, kGather and kGatherFlat also on a GPU, and those from kMasked on there.
enum class Route : int { kNative, kGather, kGatherFlat, kGatherPacked, kDense, kMasked, kCuda, kTriton };
constexpr int kRouteCount = 8;
const char* route_name(Route route);

struct Choice {
  std::string key;  // the case, as text: also the key in the file
  Route route;
  std::array<double, kRouteCount> seconds;  // lower quartile of each candidate's runs; 0 where not measured
};

// Where calls run, as far as choices depend on it.
struct Place {
  std::string name;                   // a GPU's; empty: this machine's CPU
  int32_t id = 0;                     // of the name, see place_id
  std::function<bool()> may_measure;  // whether it can be measured now; else what is known or preferred is taken
  std::function<double(Route route, c10::function_ref<void()> run)> seconds;  // of one run
};

const Place& cpu_place();
// What tells places apart cheaply; 0 for an empty name.
int32_t place_id(const std::string& name);

// Everything of a call that its speed depends on: shapes, lists' lengths, layout, dtype, fusion, caching, and threads
// or the GPU.
std::string case_key(const ConvCall& call, const Place& place);

class ChoiceTable {
 public:
  static ChoiceTable& instance();

  // The route for `call`, measured with `run` on its first occurrence among the candidates, of which the first is
  // preferred between equals. Candidates that raise NotImplementedError do not cover the call.
  Route choose(const ConvCall& call, const Place& place, c10::function_ref<std::vector<Route>()> candidates,
               c10::function_ref<void(const ConvCall&, Route)> run);

  // The measured choice of a case, or null.
  const Choice* find(const std::string& key);

  std::vector<Choice> all();
  void clear();
  // Where choices are kept between processes; empty: memory only. Unreadable lines are skipped with one warning.
  void set_file(const std::string& path);

 private:
  struct State;
  ChoiceTable();
  State* state_;
};

// The backend that the calling thread asked for: "auto", "native" or "aten" on CPUs. BAP_KERNELS_BACKEND is the
// default.
void set_backend(const std::string& name);
const std::string& get_backend();
// Null-like empty text if the backend can run on this machine at all, else the reason.
std::string backend_why_not(const std::string& name);
// Who knows that of backends which are not C++; called when such a backend is asked for, never before.
void set_why_not(std::function<std::string(const std::string&)> reason);

// A name for the calling thread until the scope ends, unchecked: one that another thread has set.
class BackendScope {
 public:
  explicit BackendScope(std::string name);
  ~BackendScope();
  BackendScope(const BackendScope&) = delete;
  BackendScope& operator=(const BackendScope&) = delete;

 private:
  std::string previous_;
};

}  // namespace bap_kernels
