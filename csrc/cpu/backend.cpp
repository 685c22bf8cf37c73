// The user's choice of a backend.
#include <c10/util/Exception.h>

#include <mutex>

#include "cpu/choice.h"
#include "cpu/isa.h"

namespace bap_kernels {
namespace {

std::mutex backend_mutex;
std::string backend_name = "auto";

}  // namespace

std::string backend_why_not(const std::string& name) {
  if (name == "auto" || name == "aten") return "";
  if (name == "native") {
    if (isa() != "none") return "";
    return "native: this CPU and this build share neither AVX2 nor AVX-512 (or BAP_KERNELS_ISA=none is set)";
  }
  if (name == "triton" || name == "cuda") return name + ": this version has no " + name + " kernels of this op";
  TORCH_CHECK_VALUE(false, "use_backend(): expected `name` to be auto, native, aten, triton or cuda, got ", name, ".");
}

void set_backend(const std::string& name) {
  const std::string reason = backend_why_not(name);
  TORCH_CHECK_NOT_IMPLEMENTED(reason.empty(), "use_backend(): expected `name` to be a backend that can run here, got ", name,
                              " (", reason, "). Hint: bap_kernels.info() lists every backend with its reason.");
  std::lock_guard<std::mutex> lock(backend_mutex);
  backend_name = name;
}

std::string get_backend() {
  std::lock_guard<std::mutex> lock(backend_mutex);
  return backend_name;
}

}  // namespace bap_kernels
