// Choice of the backend by measurement: each case is measured at its first call, and again until the choice is sure.
#pragma once

#include <c10/util/FunctionRef.h>

#include <array>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "ops/conv_call.h"

namespace bap_kernels {

// What can run a call: the first ones on a CPU, kGather and kGatherFlat also on a GPU, and those from kMasked on there.
enum class Route : int { kNative, kGather, kGatherFlat, kGatherPacked, kDense, kMasked, kCuda, kTriton };
constexpr int kRouteCount = 8;
const char* route_name(Route route);

using RouteSeconds = std::array<double, kRouteCount>;

struct Choice {
  std::string key;  // the case, as text: also the key in the file
  Route route;
  RouteSeconds seconds{};  // of each candidate, the least of all measurements; 0 where not measured
  int measurements = 0;    // how often the case was measured; 0: there was one candidate
  int agreeing = 0;        // the last of them in a row that had the same winner
  int64_t rounds = 0;      // rounds of all measurements in which the chosen one and its closest rival both ran
  int64_t wins = 0;        // those in which the chosen one was no slower
  double measured_at = 0;  // the last time, in seconds since 1970

  // How far the chosen one can be trusted, from 0 to 1: the share of the rounds that it won, with one round more that
  // it won and one that it lost, so that few rounds prove little.
  double confidence() const;
  // Time of its closest rival over its own; infinite without a rival.
  double margin() const;
  // Whether nothing is to be gained by another measurement: two in a row agree and are clear, or there were enough.
  // What was measured a month ago is measured once more.
  bool settled(double now) const;
};

// Where calls run, as far as choices depend on it.
struct Place {
  std::string name;                   // a GPU's; empty: this machine's CPU
  int32_t id = 0;                     // of the name, see place_id
  std::function<bool()> may_measure;  // whether it can be measured now; else what is known or preferred is taken
  std::function<double(Route route, c10::function_ref<void()> run)> seconds;  // of one run
  std::function<double()> now;                                                // seconds since 1970
  bool first_run_tells = false;  // whether a first run is about as long as others: nothing is compiled for it
};

const Place& cpu_place();
// What tells places apart cheaply; 0 for an empty name.
int32_t place_id(const std::string& name);
double seconds_since_1970();

// Everything of a call that its speed depends on: shapes, lists' lengths, layout, dtype, fusion, caching, and threads
// or the GPU.
std::string case_key(const ConvCall& call, const Place& place);

class ChoiceTable {
 public:
  static ChoiceTable& instance();

  // The route for `call`, measured with `run` on its first occurrence among the candidates, of which the first is
  // preferred between equals. Candidates that raise an error while they are measured are not taken; where all do, the
  // first one's error is raised. A choice that is not settled is measured again in later calls, a minute later at the
  // earliest and within a fiftieth of the time that the case takes.
  Route choose(const ConvCall& call, const Place& place, c10::function_ref<std::vector<Route>()> candidates,
               c10::function_ref<void(const ConvCall&, Route)> run);

  // Copies the measured choice of a case; false where there is none.
  bool find(const std::string& key, Choice& choice);

  std::vector<Choice> all();
  void clear();
  // Where choices are kept between processes; empty: memory only, with the reason why if that was not asked for. A file
  // that cannot be used is named in one warning.
  void set_file(const std::string& path, const std::string& problem = "");
  // Why choices are not kept in the file; empty if they are or if there is none.
  std::string file_problem();
  // Most cases that are remembered; what was not used for longest is forgotten first.
  void set_limit(int64_t cases);

 private:
  struct State;
  ChoiceTable();
  Route measure_first(const ConvCall& call, const Place& place, const std::vector<Route>& candidates,
                      c10::function_ref<void(const ConvCall&, Route)> run);
  Route measure_again(const ConvCall& call, const Place& place, Choice known, const std::vector<Route>& candidates,
                      c10::function_ref<void(const ConvCall&, Route)> run);
  State* state_;
};

// The backend that the calling thread asked for: "auto", "native" or "aten" on CPUs. A thread begins with the default,
// BAP_KERNELS_BACKEND.
void set_backend(const std::string& name);
const std::string& get_backend();
void set_default_backend(const std::string& name);
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
