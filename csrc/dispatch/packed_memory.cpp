// See packed_memory.h.
#include "dispatch/packed_memory.h"

#include <array>
#include <limits>

#include "dispatch/packed_cache.h"

namespace bap_kernels {
namespace {

constexpr std::array<const char*, 3> kNames = {"auto", "fast", "shared"};

PackedMemory named(const std::string& name) {
  for (size_t i = 0; i < kNames.size(); ++i) {
    if (name == kNames[i]) return static_cast<PackedMemory>(i);
  }
  TORCH_CHECK_VALUE(false, "set_packed_memory(): expected `name` to be auto, fast or shared, got ", name, ".");
}

PackedMemory& default_setting() {
  static PackedMemory memory = PackedMemory::kAuto;
  return memory;
}

PackedMemory& setting() {
  thread_local PackedMemory own = default_setting();
  return own;
}

}  // namespace

void set_packed_memory(const std::string& name) { setting() = named(name); }
std::string packed_memory_name() { return kNames[static_cast<size_t>(setting())]; }
PackedMemory packed_memory() { return setting(); }

// At import, before other threads call us.
void set_default_packed_memory(const std::string& name) { default_setting() = named(name); }

bool serves_all_lists(const ConvCall& c, int64_t pixels_for_copy) {
  if (!has_value(c.weight_list()) || has_value(c.out_index) || packed_memory() == PackedMemory::kFast) return false;
  if (packed_memory() == PackedMemory::kAuto && c.shape.batch * c.shape.out_h * c.shape.out_w < pixels_for_copy) {
    return false;
  }
  // Lists of bfloat16 channels do not fall on the pairs that a lane holds.
  if (!c.input.is_cpu() || c.groups != 1 || c.input.scalar_type() != at::kFloat) return false;
  const int64_t steps = c.weight.size(1) * c.taps();
  return steps <= std::numeric_limits<int32_t>::max() / 4096 && PackedCache::keeps(c);
}

ConvCall over_all_channels(const ConvCall& c) {
  ConvCall all{{c.with_lists(kAbsent, c.out_index), c.fusion, c.cache_packed}, c.shape};
  all.shape.channels_in = all.shape.kept_in = c.weight.size(1);
  return all;
}

}  // namespace bap_kernels
