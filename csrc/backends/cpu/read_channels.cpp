// When a learnt list of read channels is believed. See read_channels.h.
#include "backends/cpu/read_channels.h"

#include <algorithm>
#include <mutex>
#include <string>
#include <unordered_map>

#include "dispatch/python_hooks.h"

namespace bap_kernels {
namespace {

// A new reader that a list misses goes unseen for 15 steps at most, and the search costs a sixteenth of what it did.
constexpr int kCallsPerSearch = 16;

struct Known {
  std::vector<bool> unread;  // what was last found to be right
  int calls = 0;             // since then
  bool refuted = false;
};

std::mutex mutex;

std::unordered_map<int64_t, Known>& known_readers() {
  static auto* known = new std::unordered_map<int64_t, Known>();
  return *known;
}

// Whether the list may be used unseen; counts the call.
bool believed(int64_t reader, const std::vector<bool>& unread) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known_readers().find(reader);
  if (found == known_readers().end()) return false;
  Known& known = found->second;
  return !known.refuted && known.unread == unread && ++known.calls < kCallsPerSearch;
}

bool refuted_before(int64_t reader) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known_readers().find(reader);
  return found != known_readers().end() && found->second.refuted;
}

void remember(int64_t reader, const std::vector<bool>& unread, bool refuted) {
  if (reader == 0) return;
  const std::lock_guard<std::mutex> lock(mutex);
  known_readers()[reader] = {refuted ? std::vector<bool>() : unread, 0, refuted};
}

}  // namespace

std::vector<bool> unread_channels(const at::Tensor& read, int64_t reader,
                                  const std::function<std::vector<bool>()>& search) {
  const at::Tensor dense = read.contiguous();
  const bool* listed = dense.const_data_ptr<bool>();
  std::vector<bool> unread(dense.numel());
  for (size_t c = 0; c < unread.size(); ++c) unread[c] = !listed[c];
  // A list that leaves nothing out says nothing.
  const bool idle = std::find(unread.begin(), unread.end(), true) == unread.end();
  if (idle || refuted_before(reader)) return search();
  if (believed(reader, unread)) return unread;
  const std::vector<bool> zero = search();
  for (size_t c = 0; c < unread.size(); ++c) {
    if (!unread[c] || zero[c]) continue;
    remember(reader, unread, /*refuted=*/true);
    warn(
        "switched_conv2d_backward(): expected the output gradient to be zero in channels that `read` leaves out, "
        "got other values in channel " +
        std::to_string(c) +
        ". Hint: something reads the layer's result that its list of readers does not name, such as a hook or a "
        "loss on features; gradients are right, and the list is not used again.");
    return zero;
  }
  remember(reader, unread, /*refuted=*/false);
  return zero;
}

}  // namespace bap_kernels
