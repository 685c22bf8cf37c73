// Three convolutions in a row, 1x1, depthwise and 1x1 (expand, filter, project), as one pass over bands of rows: what
// lies between them stays in the cache of a core and is never stored as a whole. Sandler et al., arXiv 1801.04381.
#pragma once

#include "ops/conv_call.h"

namespace bap_kernels {

// Whether the native kernels can compute them so.
bool bands_cover(const BlockCalls& calls);
// Whether they gain by it by rule, where nothing is measured; and whether a measurement is worth its time. Of calls
// that they cover.
bool bands_expected(const BlockCalls& calls);
bool bands_promise(const BlockCalls& calls);

// The last one's result, bit for bit that of the three native direct convolutions.
at::Tensor conv_bands(const BlockCalls& calls);

}  // namespace bap_kernels
