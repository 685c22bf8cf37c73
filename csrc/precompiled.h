// What most sources include of torch, read once and not in each of them: half of the build's time. A source still
// includes what it uses; compilers other than GCC read it without this. No source includes it, so it has no guard.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>
