// Three convolutions in a row, 1x1, depthwise and 1x1 (expand, filter, project), as one pass over bands of rows: what
// lies between them stays in the cache of a core and is never stored as a whole. Sandler et al., arXiv 1801.04381.
#pragma once

#include "ops/conv_call.h"

namespace bap_kernels {

// Checked calls. The input of each but the first one is the result of the one before; it is used
// for its sizes and strides only, and is neither read nor written.
struct BandCalls {
  const ConvCall &first, &depthwise, &last;
};

// Whether the native kernels compute them so, and are expected to gain by it.
bool bands_apply(const BandCalls& calls);

// The last one's result, bit for bit that of the three native direct convolutions.
at::Tensor conv_bands(const BandCalls& calls);

}  // namespace bap_kernels
