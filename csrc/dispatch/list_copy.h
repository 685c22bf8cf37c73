// A call's own copy of a channel list: what is checked is what the kernels read, whatever another thread writes to the
// list meanwhile.
#pragma once

#include "ops/op.h"

namespace bap_kernels {

// Copies an int32 list on the CPU, contiguous, into memory that the thread keeps for such copies. Every other tensor is
// passed on: those that the checks refuse, lists on GPUs, which are not read on the host, and the lists of an opt-in
// backend, which keeps what it derives from them by their identity. The copy must outlive all who refer to it.
class ListCopy {
 public:
  explicit ListCopy(const OptionalTensor& list);
  ListCopy(ListCopy&& other) noexcept : list_(std::move(other.list_)), own_(other.own_) { other.own_ = false; }
  ListCopy(const ListCopy&) = delete;
  ListCopy& operator=(const ListCopy&) = delete;
  ListCopy& operator=(ListCopy&&) = delete;
  ~ListCopy();

  const OptionalTensor& get() const { return list_; }

 private:
  OptionalTensor list_;
  bool own_ = false;  // its memory goes back to the thread
};

}  // namespace bap_kernels
