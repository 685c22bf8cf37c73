// Running one checked call on a CPU by a given route.
#pragma once

#include <vector>

#include "dispatch/choice.h"

namespace bap_kernels {

// The routes that can run the call, preferred first; never empty.
std::vector<Route> candidate_routes(const ConvCall& call);

at::Tensor run_route(const ConvCall& call, Route route);

// By the user's backend, or by measurement.
at::Tensor run_cpu(const ConvCall& call, const char* op);

}  // namespace bap_kernels
