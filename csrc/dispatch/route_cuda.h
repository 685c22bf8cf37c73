// What `auto` weighs on CUDA devices, and how it measures there: by events of the device, through PyTorch's generic
// interfaces, so that nothing here links with CUDA.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "dispatch/choice.h"

namespace bap_kernels {

// Why `auto` leaves a named backend out; empty if it does not. `shown`: see kShownRight.
std::string auto_why_not(const std::string& backend, const std::vector<std::string>& shown);

// The routes for a call, preferred first: the first needs no measurement and runs every call.
std::vector<Route> cuda_candidate_routes(const ConvCall& call, const std::vector<std::string>& shown);

at::Tensor run_cuda_route(const ConvCall& call, Route route, const char* op);

// Who knows a device's name, and whether the current stream is being captured; without it nothing is measured.
void set_cuda_facts(std::function<std::string(int64_t)> name, std::function<bool()> capturing);

// The place of choices for a tensor's device: a GPU's for CUDA tensors, else this machine's CPU.
const Place& place_of(const at::Tensor& input);

}  // namespace bap_kernels
