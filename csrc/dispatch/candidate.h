// The ways to compute one call that `auto` chooses among.
#pragma once

namespace bap_kernels {

// In the order in which `auto` prefers them.
enum class BackendId : int { kNative, kAten, kCuda, kTriton };
constexpr int kBackendCount = 4;

// In the order in which backends have them: the CPU kernels', ATen's, those of backends for GPUs. The last two are ways
// to compute a block of three convolutions.
enum class Candidate : int {
  kNative,
  kWinograd4,     // F(4 x 4, 3 x 3) on the CPU
  kWinograd2,     // F(2 x 2, 3 x 3) on the CPU
  kGather,        // select the listed channels, then a convolution with the listed weight slices
  kGatherFlat,    // the same, selecting from a channels_last input as a matrix of pixels x channels
  kGatherPacked,  // the same on a CPU, with oneDNN's own order of the weight slices, made beforehand
  kDense,         // the full input with zeros in the weight of unlisted channels
  kMasked,        // the same with zeros in the input too, which no host has to look at: for devices
  kCuda,
  kTriton,
  kBands,   // in one pass over bands of rows, by the CPU kernels
  kLayers,  // each by itself, as is chosen for it
};
constexpr int kCandidateCount = 12;

// As in bap_kernels.choices() and in the file of choices.
const char* candidate_name(Candidate candidate);

}  // namespace bap_kernels
