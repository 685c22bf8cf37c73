// Output channels that nothing reads, as a layer has learnt them from its readers' switches, and when that is believed.
#pragma once

#include <functional>
#include <vector>

#include "ops/op.h"

namespace bap_kernels {

// Of each channel whether its gradient is zero throughout: what `read`, bool (C_out,), says, or what `search` finds.
// Something that the layer cannot know of may read a channel too (a hook, a loss on features), so a list is compared
// with the gradient where it is new to its reader, in every sixteenth call after that, and always for reader 0. Where
// the gradient contradicts it, a warning says so, the gradient decides, and that reader's lists are not used again.
std::vector<bool> unread_channels(const at::Tensor& read, int64_t reader,
                                  const std::function<std::vector<bool>()>& search);

}  // namespace bap_kernels
