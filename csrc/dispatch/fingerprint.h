// Fingerprints of memory: what tells whether a tensor still holds the values that something was made from.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>

#include "ops/conv_call.h"

namespace bap_kernels {

using Fingerprint = std::array<uint64_t, 8>;

// Of `bytes` bytes: eight lanes of 64 bits, at about 8 bytes a cycle. Any change of one word changes it for certain.
Fingerprint fingerprint_bytes(const void* data, int64_t bytes, uint64_t seed = 0);

// Whether the tensor's rows (axis 0) are blocks of memory without gaps, which fingerprint_rows() needs.
bool has_dense_rows(const at::Tensor& t);

// Of the listed rows; `rows` is null for all, else a contiguous int32 list on the CPU. On all threads where that pays;
// the result does not depend on their number.
Fingerprint fingerprint_rows(const at::Tensor& t, const OptionalTensor& rows);

// Of everything that a CPU tensor holds, in the order of its elements.
Fingerprint fingerprint_values(const at::Tensor& t);

}  // namespace bap_kernels
