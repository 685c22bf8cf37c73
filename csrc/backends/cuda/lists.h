// Channel lists as the CUDA kernels take them: as they are, or as aligned blocks found once per list.
#pragma once

#include "ops/gathered_conv2d.h"

namespace bap_kernels {

// `entries` are channels (block 1) or numbers of blocks of `block` neighbouring channels, int32 and dense; without a
// list there are none, and `block` is 0.
struct ListForm {
  OptionalTensor entries;
  int64_t block = 0, length = 0;
};

// The longest of 32, 16 and 8 such that the list is a run of whole blocks of that many channels, each beginning at a
// multiple of it; else 1.
int64_t block_length(const int32_t* list, int64_t length);

// The form of a list of the ops, or of none over `channels`. A list on a GPU is read once, at its first use, which
// waits for the device. Lists whose changes cannot be seen (inference tensors) and lists first met while a CUDA graph
// is captured are taken channel by channel, and so is every list without `blocks`.
ListForm list_form(const OptionalTensor& index, int64_t channels, bool blocks = true);

}  // namespace bap_kernels
