// How much memory packed weights of layers with lists may take: a copy for each list, or one.
//
//   own      the listed slices alone, packed: the least to read
//   shared   all input channels, packed once; each call copies the listed part, whole vectors of filters side by side,
//            and drops the copy afterwards. For calls that list input channels only, in float32, by the native CPU
//            kernels. Tiles that walked the list in the packed weight would jump in it once for every few pixels.
//   last     the listed slices alone, but only those of the list that was used last are kept
//
//                 lists of inputs only        any others
//   kFast         own                         own
//   kAuto         shared, with enough pixels  own
//   kShared       shared, where it applies    last
#pragma once

#include <string>

#include "ops/conv_call.h"

namespace bap_kernels {

enum class PackedMemory : int { kAuto, kFast, kShared };

// The setting of the calling thread: "auto", "fast" or "shared". A thread begins with the default,
// BAP_KERNELS_PACKED_MEMORY.
void set_packed_memory(const std::string& name);
std::string packed_memory_name();
PackedMemory packed_memory();
void set_default_packed_memory(const std::string& name);

// Whether the native kernels take one packed weight for all lists of input channels. A copy is to serve so many
// pixels of the result, except where memory is what counts.
bool serves_all_lists(const ConvCall& call, int64_t pixels_for_copy);

// The call that reads all of the weight's channels, whose packed weight that is.
ConvCall over_all_channels(const ConvCall& call);

}  // namespace bap_kernels
