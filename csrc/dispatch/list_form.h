// Channel lists as the kernels of GPU backends take them: as they are, or as aligned blocks; and what else is derived
// from a list. Derived once, and kept as long as the list lives unchanged.
#pragma once

#include "ops/gathered_conv2d.h"

namespace bap_kernels {

constexpr int64_t kLongestBlock = 32;

// `entries` are channels (block 1) or numbers of blocks of `block` neighbouring channels, int32 and dense; without a
// list there are none, and `block` is 0. One look-up then serves a block, which is read in vectors of 128 bits.
struct ListForm {
  OptionalTensor entries;
  int64_t block = 0, length = 0;
};

// The longest of 32, 16 and 8, up to `most`, such that the list is a run of whole blocks of that many channels, each
// beginning at a multiple of it; else 1.
int64_t block_length(const int32_t* list, int64_t length, int64_t most = kLongestBlock);

// The form of a list of the ops, or of none over `channels`. A list on a GPU is read once, at its first use, which
// waits for the device. Lists whose changes cannot be seen (inference tensors) and lists first met while a graph is
// captured are taken channel by channel, and so is every list without `blocks`. `most`: channels of the longest blocks.
ListForm list_form(const OptionalTensor& index, int64_t channels, bool blocks = true, int64_t most = kLongestBlock);

// For each of `channels` its position in the list, or -1; int32, (channels,).
at::Tensor inverse_list(const at::Tensor& index, int64_t channels);

// 0, 1, ... on a device, int32: a list for a run of a mixed batch that has none.
at::Tensor all_channels(int64_t channels, c10::Device device);

}  // namespace bap_kernels
