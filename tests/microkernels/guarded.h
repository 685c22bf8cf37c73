// Memory for operands of tests, and random numbers that are the same everywhere.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

// Readable bytes between two pages that fault. What no operand fills is 0xff: NaN as float and as bfloat16.
class Guarded {
 public:
  // A whole number of pages.
  explicit Guarded(int64_t bytes) : bytes_(bytes) {
    base_ = static_cast<char*>(
        mmap(nullptr, bytes_ + 2 * kGuard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_, kGuard, PROT_NONE) != 0 ||
        mprotect(base_ + kGuard + bytes_, kGuard, PROT_NONE) != 0) {
      std::abort();
    }
  }
  Guarded(const Guarded&) = delete;
  ~Guarded() { munmap(base_, bytes_ + 2 * kGuard); }

  // `bytes` that end at the upper guard, or begin at the lower one.
  char* place(int64_t bytes, bool at_end) {
    if (bytes < 0 || bytes > bytes_) std::abort();
    std::memset(base_ + kGuard, 0xff, bytes_);
    return base_ + kGuard + (at_end ? bytes_ - bytes : 0);
  }

  const char* data() const { return base_ + kGuard; }
  std::vector<char> copy() const { return {data(), data() + bytes_}; }

 private:
  static constexpr int64_t kGuard = 4096;
  const int64_t bytes_;
  char* base_;
};

// splitmix64.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  int below(int n) { return static_cast<int>(next() >> 33) % n; }
  float real() { return static_cast<float>(static_cast<int64_t>(next() >> 40)) / 8388608.f - 1.f; }

 private:
  uint64_t state_;
};
