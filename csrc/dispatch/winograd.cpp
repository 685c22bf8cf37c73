// The calling thread's setting. See winograd.h.
#include "dispatch/winograd.h"

namespace bap_kernels {
namespace {

bool& default_setting() {
  static bool allowed = true;
  return allowed;
}

// Each thread's own, as the backend is.
bool& setting() {
  thread_local bool own = default_setting();
  return own;
}

int64_t& forced() {
  thread_local int64_t size = 0;
  return size;
}

}  // namespace

void set_winograd(bool allowed) { setting() = allowed; }
bool get_winograd() { return setting(); }

// At import, before other threads call us.
void set_default_winograd(bool allowed) { default_setting() = allowed; }

void force_winograd(int64_t size) {
  TORCH_CHECK_VALUE(size == 0 || size == 2 || size == 4, "force_winograd(): expected `size` to be 0, 2 or 4, got ",
                    size, ".");
  forced() = size;
}
int64_t forced_winograd() { return forced(); }

}  // namespace bap_kernels
