// The gathered convolution of one checked call, by the named backend or the measured choice.
#pragma once

#include "dispatch/backend.h"
#include "dispatch/list_copy.h"

namespace bap_kernels {

at::Tensor run_gathered_conv2d(const ConvCall& call, const char* op);

// A checked call of fused arguments, with its own copies of their lists.
class FusedCall {
 public:
  explicit FusedCall(const GatheredConv2dFusedArgs<int64_t>& a);
  FusedCall(const FusedCall&) = delete;
  FusedCall& operator=(const FusedCall&) = delete;

 private:
  const ListCopy in_list_, out_list_, weight_list_, dual_list_;
  const GatheredConv2dFusedArgs<int64_t> args_;

 public:
  ConvCall call;
};

// The backend of a backward that is not named: CPU kernels where they cover it, else ATen.
const Backend& backward_backend(const at::Tensor& input, const ConvShape<int64_t>& shape);

}  // namespace bap_kernels
