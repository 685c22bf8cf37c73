// Global memory as a list of tensors, and a block's shared memory with what is known of every granule of it.
//
// Order is kept by vector clocks. A thread's clock goes up whenever it releases (at a barrier, at an arrival); a
// barrier joins the clocks of those who meet. A write is stamped with its thread and that thread's clock, and an access
// by another thread is a race unless its own vector has reached the stamp. That covers barriers of the whole block, of
// some warps, and mbarriers, without knowing which of them a kernel uses.
//
// WGMMA and bulk copies reach shared memory through the asynchronous proxy, and need a fence behind the writes of
// threads as well: a second vector, `fenced`, holds what a thread knew at its last fence.proxy.async, and travels along
// with the first.
//
// Bulk copies write as nobody's: each mbarrier has a clock as if it were a thread, which goes up when a copy lands that
// it counts, and which those learn of who see its phase complete.
#pragma once

#include "program.h"

namespace ptx {

// Vector clocks of a block's threads.
class Clocks {
 public:
  // `barriers`: so many mbarriers have clocks, behind those of the threads.
  Clocks(int threads, int barriers, bool fences);
  int threads() const { return threads_; }
  int barriers() const { return width_ - threads_; }
  uint32_t own(int thread) const { return at(thread)[thread]; }
  bool knows(int thread, int other, uint32_t clock) const { return at(thread)[other] >= clock; }
  bool has_fenced(int thread, int other, uint32_t clock) const { return fenced(thread)[other] >= clock; }
  void fence(int thread);
  // All threads learn what each of them knows.
  void join(const std::vector<int>& threads);
  // A place where threads leave what they know for others.
  struct Mail {
    std::vector<uint32_t> known, fenced;
  };
  void release(int thread, Mail& to);
  void acquire(int thread, const Mail& from);
  // Leaves what one clock says, without a need of a fence.
  void leave(int number, uint32_t clock, Mail& to) const;

 private:
  const uint32_t* at(int thread) const { return &known_[static_cast<size_t>(thread) * width_]; }
  uint32_t* at(int thread) { return &known_[static_cast<size_t>(thread) * width_]; }
  const uint32_t* fenced(int thread) const { return &fenced_[static_cast<size_t>(thread) * width_]; }
  uint32_t* fenced(int thread) { return &fenced_[static_cast<size_t>(thread) * width_]; }
  int threads_, width_;
  bool fences_;
  std::vector<uint32_t> known_, fenced_;
};

// One tensor of global memory, by address.
struct Tensor {
  uint64_t begin, end;
  // By 2 bytes: the thread of the launch that wrote there, from 1, and its clock; 0: none. Empty until a thread writes.
  std::vector<uint64_t> writers;
};

// A thread at an access to global memory: its number in its block and in the launch, from 1.
struct Accessor {
  const Clocks& clocks;
  int thread;
  uint32_t number;
  // Whether it comes behind a write: its own, or one of its block's that a barrier has ordered.
  bool follows(uint64_t writer) const {
    const auto other = static_cast<uint32_t>(writer >> 32);
    if (other == 0 || other == number) return true;
    const int64_t in_block = static_cast<int64_t>(other) - (static_cast<int64_t>(number) - thread);
    return in_block >= 0 && in_block < clocks.threads() &&
           clocks.knows(thread, static_cast<int>(in_block), static_cast<uint32_t>(writer));
  }
};

class GlobalMemory {
 public:
  void add(uint64_t begin, uint64_t bytes);
  void remove(uint64_t begin);
  void clear() { tensors_.clear(); }
  bool contains(uint64_t address) const { return find(address) != nullptr; }
  // Forgets who wrote.
  void begin_launch();
  // Checks an access and returns where it is.
  const uint8_t* read(uint64_t address, int bytes, const Accessor& by);
  uint8_t* write(uint64_t address, int bytes, const Accessor& by);
  // Where only tensors that a launch names may be touched: those that contain one of these addresses.
  void restrict_to(const std::vector<uint64_t>& addresses);

 private:
  Tensor* find(uint64_t address) const;
  Tensor& checked(uint64_t address, int bytes, const char* what);
  std::map<uint64_t, std::unique_ptr<Tensor>> tensors_;  // by begin
  mutable Tensor* last_ = nullptr;
  bool restricted_ = false;
  std::vector<Tensor*> allowed_;
};

constexpr int kGranule = 2;

class SharedMemory {
 public:
  SharedMemory(int64_t bytes, Clocks& clocks, bool check_uninitialised);
  // Checks an access by a thread and returns where it is.
  const uint8_t* read(uint32_t address, int bytes, int thread);
  uint8_t* write(uint32_t address, int bytes, int thread);
  // A copy that a thread has started: nobody may touch its target until it lands.
  void start_copy(uint32_t address, int bytes, int thread);
  uint8_t* land_copy(uint32_t address, int bytes, int thread);
  // A copy through the asynchronous proxy that a thread has started; it lands as a write by a clock.
  void start_bulk_copy(uint32_t address, int bytes, int thread);
  uint8_t* land_bulk_copy(uint32_t address, int bytes, int number, uint32_t clock);
  // A read through the asynchronous proxy by a warp; nobody may write there until `end_async_read`.
  const uint8_t* start_async_read(uint32_t address, int bytes, int thread);
  void end_async_read(uint32_t address, int bytes, int thread);
  // Reads that are not checked for races, of synchronisation objects.
  void check_object(uint32_t address, int bytes, int thread);
  // The same of objects that the asynchronous proxy reaches: a fence has to stand behind their set-up.
  void check_async_object(uint32_t address, int bytes, int thread);

 private:
  size_t granule(uint32_t address, int bytes, const char* what) const;
  void check_written(size_t granule, int thread, const char* what) const;
  void check_overwrite(size_t granule, int thread) const;
  void check_fenced(size_t granule, int thread, const char* what) const;
  [[noreturn]] void race(size_t granule, int thread, const char* what, int other) const;

  Clocks& clocks_;
  int warps_;
  bool check_uninitialised_;
  std::vector<uint8_t> data_;
  std::vector<uint64_t> writers_;      // thread + 1, clock; 0: never written
  std::vector<uint32_t> readers_;      // by granule and warp: clock of the last reading thread, its lane
  std::vector<uint8_t> in_flight_;     // copies under way
  std::vector<uint16_t> async_reads_;  // products under way that read here
};

}  // namespace ptx
