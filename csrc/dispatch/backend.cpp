// The registered backends, their candidates, and the thread's setting.
#include "dispatch/backend.h"

#include <c10/util/Exception.h>

#include <array>
#include <functional>
#include <utility>

namespace bap_kernels {
namespace {

std::array<const Backend*, kBackendCount>& backends() {
  static std::array<const Backend*, kBackendCount> registered{};
  return registered;
}

struct CandidateRow {
  const char* name;
  BackendId backend;
};
constexpr CandidateRow kCandidates[kCandidateCount] = {
    {"native", BackendId::kNative}, {"winograd4", BackendId::kNative}, {"winograd2", BackendId::kNative},
    {"gather", BackendId::kAten},   {"gather_flat", BackendId::kAten}, {"gather_packed", BackendId::kAten},
    {"dense", BackendId::kAten},    {"masked", BackendId::kAten},      {"cuda", BackendId::kCuda},
    {"triton", BackendId::kTriton}, {"bands", BackendId::kNative},     {"layers", BackendId::kNative},
};

// The backends that choose by themselves: what was measured to be fastest, or what a rule says.
constexpr const char *kAuto = "auto", *kHeuristic = "heuristic";

// Null for those that choose, and for unknown names.
const Backend* find_backend(const std::string& name) {
  for (const Backend* registered : backends()) {
    if (name == registered->name) return registered;
  }
  return nullptr;
}

struct Setting {
  std::string name;
  const Backend* backend;

  explicit Setting(const std::string& text) : name(text), backend(find_backend(text)) {}
};

std::string& default_backend() {
  static auto* name = new std::string(kAuto);
  return *name;
}

// Each thread's own, as grad mode and autocast are: two threads that overlap cannot restore each other's setting.
Setting& setting() {
  thread_local Setting own(default_backend());
  return own;
}

using Reason = std::function<std::string(const std::string&)>;

// Never destroyed: it holds a Python function, and Python is gone before statics are.
Reason*& python_reason() {
  static Reason* function = nullptr;
  return function;
}

}  // namespace

RegisterBackend::RegisterBackend(BackendId id, const Backend& backend) { backends()[static_cast<int>(id)] = &backend; }

const Backend& backend(BackendId id) { return *backends()[static_cast<int>(id)]; }

const char* candidate_name(Candidate candidate) { return kCandidates[static_cast<int>(candidate)].name; }

BackendId backend_of(Candidate candidate) { return kCandidates[static_cast<int>(candidate)].backend; }

at::Tensor run_candidate(const ConvCall& call, Candidate candidate, const char* op) {
  return backend(backend_of(candidate)).run(call, candidate, op);
}

void set_backend(const std::string& name) {
  const std::string reason = backend_unavailable_reason(name);
  TORCH_CHECK_NOT_IMPLEMENTED(reason.empty(), "use_backend(): expected `name` to be a backend that can run here, got ",
                              name, " (", reason, "). Hint: bap_kernels.info() lists every backend with its reason.");
  setting() = Setting(name);
}

const std::string& get_backend() { return setting().name; }

// At import, before other threads call us.
void set_default_backend(const std::string& name) { default_backend() = name; }

bool backend_is_named() { return setting().backend != nullptr; }
bool auto_measures() { return setting().name != kHeuristic; }

const Backend& heuristic_backend(const ConvCall& call) {
  const Backend& native = backend(BackendId::kNative);
  return call.input.is_cpu() && native.unsupported_reason(call).empty() ? native : backend(BackendId::kAten);
}

const Backend* named_backend(const at::Tensor& input) {
  const Backend* named = setting().backend;
  if (named == &backend(BackendId::kNative) && !input.is_cpu()) return &backend(BackendId::kAten);
  return named;
}

const Backend* named_opt_in_backend() {
  const Backend* named = setting().backend;
  return named != nullptr && named->opt_in ? named : nullptr;
}

std::string backend_unavailable_reason(const std::string& name) {
  if (name == kAuto || name == kHeuristic) return "";
  const Backend* backend = find_backend(name);
  TORCH_CHECK_VALUE(backend != nullptr,
                    "use_backend(): expected `name` to be auto, heuristic, native, aten, triton or cuda, got ", name,
                    ".");
  return backend->unavailable_reason();
}

void set_unavailable_reason(Reason reason) { python_reason() = new Reason(std::move(reason)); }

std::string python_unavailable_reason(const std::string& name) {
  return python_reason() ? (*python_reason())(name) : "bap_kernels.dispatch is not loaded";
}

BackendScope::BackendScope(const std::string& name) : previous_(get_backend()) { setting() = Setting(name); }
BackendScope::~BackendScope() { setting() = Setting(previous_); }

}  // namespace bap_kernels
