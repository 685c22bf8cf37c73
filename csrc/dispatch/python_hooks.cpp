// See python_hooks.h. Without Python, as in a program in C++, warnings go where torch's go.
#include "dispatch/python_hooks.h"

#include <c10/util/Exception.h>

#include <utility>

namespace bap_kernels {
namespace {

PythonHooks& hooks() {
  static auto* known = new PythonHooks();
  return *known;
}

}  // namespace

void set_python_hooks(PythonHooks given) { hooks() = std::move(given); }

void warn(const std::string& text) {
  if (hooks().warn) {
    hooks().warn(text);
  } else {
    TORCH_WARN(text);
  }
}

void check_interrupt() {
  if (hooks().check_interrupt) hooks().check_interrupt();
}

bool is_interrupt(const std::exception_ptr& error) { return hooks().is_interrupt && hooks().is_interrupt(error); }

}  // namespace bap_kernels
