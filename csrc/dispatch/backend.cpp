// The user's choice of a backend.
#include <c10/util/Exception.h>

#include <utility>

#include "backends/cpu/isa.h"
#include "dispatch/choice.h"
#include "dispatch/named_backend.h"

namespace bap_kernels {
namespace {

std::string& default_backend() {
  static auto* name = new std::string("auto");
  return *name;
}

// Each thread's own, as grad mode and autocast are: two threads that overlap cannot restore each other's setting.
std::string& backend_name() {
  thread_local std::string name = default_backend();
  return name;
}

using WhyNot = std::function<std::string(const std::string&)>;

// Never destroyed: it holds a Python function, and Python is gone before statics are.
WhyNot*& why_not_function() {
  static WhyNot* function = nullptr;
  return function;
}

}  // namespace

void set_why_not(WhyNot reason) { why_not_function() = new WhyNot(std::move(reason)); }

BackendScope::BackendScope(std::string name) : previous_(std::exchange(backend_name(), std::move(name))) {}
BackendScope::~BackendScope() { backend_name() = previous_; }

std::string backend_why_not(const std::string& name) {
  if (name == "auto" || name == "aten") return "";
  if (name == "native") {
    if (isa() != "none") return "";
    return "this CPU and this build share neither AVX2 nor AVX-512 (or BAP_KERNELS_ISA=none is set)";
  }
  if (name == "triton" || name == "cuda") {
    return why_not_function() ? (*why_not_function())(name) : "bap_kernels._dispatch is not loaded";
  }
  TORCH_CHECK_VALUE(false, "use_backend(): expected `name` to be auto, native, aten, triton or cuda, got ", name, ".");
}

void set_backend(const std::string& name) {
  const std::string reason = backend_why_not(name);
  TORCH_CHECK_NOT_IMPLEMENTED(reason.empty(), "use_backend(): expected `name` to be a backend that can run here, got ",
                              name, " (", reason, "). Hint: bap_kernels.info() lists every backend with its reason.");
  backend_name() = name;
}

const std::string& get_backend() { return backend_name(); }

// At import, before other threads call us.
void set_default_backend(const std::string& name) { default_backend() = name; }

const NamedBackend* named_backend() {
  const std::string& name = backend_name();
  return name == "cuda" ? &cuda_backend : name == "triton" ? &triton_backend : nullptr;
}

}  // namespace bap_kernels
