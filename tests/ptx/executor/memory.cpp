#include "memory.h"

#include <algorithm>
#include <cstdio>

namespace ptx {
namespace {

std::string hex(uint64_t value) {
  char text[24];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

}  // namespace

void GlobalMemory::add(uint64_t begin, uint64_t bytes) {
  tensors_[begin] = std::make_unique<Tensor>(Tensor{begin, begin + bytes, {}});
  last_ = nullptr;
}

void GlobalMemory::remove(uint64_t begin) {
  tensors_.erase(begin);
  last_ = nullptr;
}

void GlobalMemory::begin_launch() {
  for (auto& [begin, tensor] : tensors_) tensor->writers.clear();
  restricted_ = false;
  allowed_.clear();
  last_ = nullptr;
}

void GlobalMemory::restrict_to(const std::vector<uint64_t>& addresses) {
  restricted_ = true;
  for (const uint64_t address : addresses) {
    if (Tensor* found = find(address)) allowed_.push_back(found);
  }
  last_ = nullptr;
}

Tensor* GlobalMemory::find(uint64_t address) const {
  auto next = tensors_.upper_bound(address);
  if (next == tensors_.begin()) return nullptr;
  Tensor* tensor = std::prev(next)->second.get();
  return address < tensor->end ? tensor : nullptr;
}

Tensor& GlobalMemory::checked(uint64_t address, int bytes, const char* what) {
  if (address % bytes != 0) {
    throw Fault(std::string(what) + " of " + std::to_string(bytes) + " bytes at the misaligned global address " +
                hex(address));
  }
  if (last_ == nullptr || address < last_->begin || address >= last_->end) {
    last_ = find(address);
    if (last_ != nullptr && restricted_ && std::find(allowed_.begin(), allowed_.end(), last_) == allowed_.end()) {
      last_ = nullptr;
    }
  }
  if (last_ == nullptr || address + bytes > last_->end) {
    // Which tensor is next to it tells more than the address does.
    auto next = tensors_.upper_bound(address);
    std::string near;
    if (next != tensors_.begin()) {
      const Tensor& before = *std::prev(next)->second;
      near = ", " + std::to_string(address - before.begin) + " bytes from the start of a tensor of " +
             std::to_string(before.end - before.begin) + " bytes";
    }
    throw Fault(std::string(what) + " of " + std::to_string(bytes) + " bytes outside the launch's tensors, at " +
                hex(address) + near);
  }
  return *last_;
}

const uint8_t* GlobalMemory::read(uint64_t address, int bytes, const Accessor& by) {
  const Tensor& tensor = checked(address, bytes, "read");
  if (!tensor.writers.empty()) {
    for (uint64_t at = (address - tensor.begin) / 2; at < (address - tensor.begin + bytes + 1) / 2; ++at) {
      if (!by.follows(tensor.writers[at])) {
        throw Fault("read of global memory that another thread of the launch writes, at " + hex(address));
      }
    }
  }
  return reinterpret_cast<const uint8_t*>(address);
}

uint8_t* GlobalMemory::write(uint64_t address, int bytes, const Accessor& by) {
  Tensor& tensor = checked(address, bytes, "write");
  if (tensor.writers.empty()) tensor.writers.resize((tensor.end - tensor.begin + 1) / 2);
  const uint64_t mark = static_cast<uint64_t>(by.number) << 32 | by.clocks.own(by.thread);
  for (uint64_t at = (address - tensor.begin) / 2; at < (address - tensor.begin + bytes + 1) / 2; ++at) {
    if (!by.follows(tensor.writers[at])) {
      throw Fault("write of global memory that another thread of the launch writes, at " + hex(address) + ", " +
                  std::to_string(address - tensor.begin) + " bytes from the start of a tensor");
    }
    tensor.writers[at] = mark;
  }
  return reinterpret_cast<uint8_t*>(address);
}

Clocks::Clocks(int threads, int barriers, bool fences)
    : threads_(threads),
      width_(threads + barriers),
      fences_(fences),
      known_(static_cast<size_t>(threads) * width_),
      fenced_(fences ? static_cast<size_t>(threads) * width_ : 0) {
  for (int t = 0; t < threads; ++t) at(t)[t] = 1;
}

void Clocks::fence(int thread) {
  if (!fences_) return;
  std::copy_n(at(thread), width_, fenced(thread));
  // What the thread writes from here on is not behind the fence.
  ++at(thread)[thread];
}

namespace {

void raise(uint32_t* to, const uint32_t* from, int count) {
  for (int i = 0; i < count; ++i) to[i] = std::max(to[i], from[i]);
}

}  // namespace

void Clocks::join(const std::vector<int>& threads) {
  std::vector<uint32_t> known(width_), behind(width_);
  for (const int t : threads) {
    raise(known.data(), at(t), width_);
    if (fences_) raise(behind.data(), fenced(t), width_);
  }
  for (const int t : threads) {
    std::copy_n(known.data(), width_, at(t));
    if (fences_) std::copy_n(behind.data(), width_, fenced(t));
    ++at(t)[t];
  }
}

void Clocks::release(int thread, Mail& to) {
  to.known.resize(width_);
  raise(to.known.data(), at(thread), width_);
  if (fences_) {
    to.fenced.resize(width_);
    raise(to.fenced.data(), fenced(thread), width_);
  }
  ++at(thread)[thread];
}

void Clocks::acquire(int thread, const Mail& from) {
  if (from.known.empty()) return;
  raise(at(thread), from.known.data(), width_);
  if (fences_) raise(fenced(thread), from.fenced.data(), width_);
}

void Clocks::leave(int number, uint32_t clock, Mail& to) const {
  to.known.resize(width_);
  to.fenced.resize(width_);
  to.known[number] = to.fenced[number] = clock;
}

SharedMemory::SharedMemory(int64_t bytes, Clocks& clocks, bool check_uninitialised)
    : clocks_(clocks),
      warps_((clocks.threads() + kLanes - 1) / kLanes),
      check_uninitialised_(check_uninitialised),
      // NaN in every floating-point type.
      data_(bytes, 0xff) {
  const size_t granules = (bytes + kGranule - 1) / kGranule;
  writers_.resize(granules);
  readers_.resize(granules * warps_);
  in_flight_.resize(granules);
  async_reads_.resize(granules);
}

size_t SharedMemory::granule(uint32_t address, int bytes, const char* what) const {
  const int64_t at = static_cast<int64_t>(address) - kSharedBase;
  if (at < 0 || at + bytes > static_cast<int64_t>(data_.size())) {
    throw Fault(std::string(what) + " of " + std::to_string(bytes) + " bytes at byte " + std::to_string(at) +
                " of shared memory, which has " + std::to_string(data_.size()));
  }
  if (at % (bytes < 16 ? bytes : 16) != 0) {
    throw Fault(std::string(what) + " of " + std::to_string(bytes) + " bytes at the misaligned byte " +
                std::to_string(at) + " of shared memory");
  }
  return at / kGranule;
}

void SharedMemory::race(size_t granule, int thread, const char* what, int other) const {
  const std::string by = other < clocks_.threads() ? "thread " + std::to_string(other) : "a bulk copy";
  throw Fault("race on byte " + std::to_string(granule * kGranule) + " of shared memory: thread " +
              std::to_string(thread) + " " + what + " " + by + ", and nothing orders the two");
}

void SharedMemory::check_written(size_t granule, int thread, const char* what) const {
  if (in_flight_[granule] != 0) {
    throw Fault(std::string(what) + " of byte " + std::to_string(granule * kGranule) +
                " of shared memory while a copy to it is under way");
  }
  const uint64_t writer = writers_[granule];
  if (writer == 0) {
    if (!check_uninitialised_) return;
    throw Fault(std::string(what) + " of byte " + std::to_string(granule * kGranule) +
                " of shared memory, which nothing has written");
  }
  const int other = static_cast<int>(writer >> 32) - 1;
  if (!clocks_.knows(thread, other, static_cast<uint32_t>(writer)))
    race(granule, thread, "reads what was written by", other);
}

void SharedMemory::check_overwrite(size_t granule, int thread) const {
  if (in_flight_[granule] != 0) {
    throw Fault("write of byte " + std::to_string(granule * kGranule) +
                " of shared memory while a copy to it is under way");
  }
  if (async_reads_[granule] != 0) {
    throw Fault("write of byte " + std::to_string(granule * kGranule) +
                " of shared memory while a product that was not waited for reads it");
  }
  if (const uint64_t writer = writers_[granule]) {
    const int other = static_cast<int>(writer >> 32) - 1;
    if (!clocks_.knows(thread, other, static_cast<uint32_t>(writer))) {
      race(granule, thread, "overwrites what was written by", other);
    }
  }
  const uint32_t* readers = &readers_[granule * warps_];
  for (int w = 0; w < warps_; ++w) {
    if (readers[w] == 0) continue;
    const int other = w * kLanes + static_cast<int>(readers[w] % kLanes);
    if (!clocks_.knows(thread, other, readers[w] / kLanes)) race(granule, thread, "overwrites what is read by", other);
  }
}

const uint8_t* SharedMemory::read(uint32_t address, int bytes, int thread) {
  const size_t first = granule(address, bytes, "read"), last = first + (bytes + kGranule - 1) / kGranule;
  const uint32_t mark = clocks_.own(thread) * kLanes + thread % kLanes;
  for (size_t g = first; g < last; ++g) {
    check_written(g, thread, "read");
    readers_[g * warps_ + thread / kLanes] = mark;
  }
  return &data_[address - kSharedBase];
}

uint8_t* SharedMemory::write(uint32_t address, int bytes, int thread) {
  const size_t first = granule(address, bytes, "write"), last = first + (bytes + kGranule - 1) / kGranule;
  const uint64_t mark = static_cast<uint64_t>(thread + 1) << 32 | clocks_.own(thread);
  for (size_t g = first; g < last; ++g) {
    check_overwrite(g, thread);
    writers_[g] = mark;
  }
  return &data_[address - kSharedBase];
}

void SharedMemory::start_copy(uint32_t address, int bytes, int thread) {
  uint8_t* target = write(address, bytes, thread);
  // What was there before is gone, and what comes is not there yet.
  std::fill_n(target, bytes, uint8_t{0xff});
  const size_t first = granule(address, bytes, "copy");
  for (size_t g = first; g < first + bytes / kGranule; ++g) ++in_flight_[g];
}

uint8_t* SharedMemory::land_copy(uint32_t address, int bytes, int thread) {
  const size_t first = granule(address, bytes, "copy");
  const uint64_t mark = static_cast<uint64_t>(thread + 1) << 32 | clocks_.own(thread);
  for (size_t g = first; g < first + bytes / kGranule; ++g) {
    --in_flight_[g];
    writers_[g] = mark;
  }
  return &data_[address - kSharedBase];
}

void SharedMemory::check_fenced(size_t granule, int thread, const char* what) const {
  const uint64_t writer = writers_[granule];
  const int other = static_cast<int>(writer >> 32) - 1;
  if (writer == 0 || clocks_.has_fenced(thread, other, static_cast<uint32_t>(writer))) return;
  throw Fault(std::string(what) + " byte " + std::to_string(granule * kGranule) +
              " of shared memory, and no fence.proxy.async stands behind its write by thread " + std::to_string(other));
}

void SharedMemory::start_bulk_copy(uint32_t address, int bytes, int thread) {
  const size_t first = granule(address, bytes, "bulk copy");
  for (size_t g = first; g < first + bytes / kGranule; ++g) {
    check_overwrite(g, thread);
    check_fenced(g, thread, "a bulk copy overwrites");
    ++in_flight_[g];
  }
  // What was there before is gone, and what comes is not there yet.
  std::fill_n(&data_[address - kSharedBase], bytes, uint8_t{0xff});
}

uint8_t* SharedMemory::land_bulk_copy(uint32_t address, int bytes, int number, uint32_t clock) {
  const size_t first = granule(address, bytes, "bulk copy");
  for (size_t g = first; g < first + bytes / kGranule; ++g) {
    --in_flight_[g];
    writers_[g] = static_cast<uint64_t>(number + 1) << 32 | clock;
  }
  return &data_[address - kSharedBase];
}

const uint8_t* SharedMemory::start_async_read(uint32_t address, int bytes, int thread) {
  const size_t first = granule(address, bytes, "read by a product");
  for (size_t g = first; g < first + bytes / kGranule; ++g) {
    check_written(g, thread, "read by a product");
    check_fenced(g, thread, "a product reads");
    ++async_reads_[g];
  }
  return &data_[address - kSharedBase];
}

void SharedMemory::end_async_read(uint32_t address, int bytes, int thread) {
  const size_t first = granule(address, bytes, "read by a product");
  const uint32_t mark = clocks_.own(thread) * kLanes + thread % kLanes;
  for (size_t g = first; g < first + bytes / kGranule; ++g) {
    --async_reads_[g];
    readers_[g * warps_ + thread / kLanes] = mark;
  }
}

void SharedMemory::check_object(uint32_t address, int bytes, int thread) {
  const size_t first = granule(address, bytes, "access to an mbarrier");
  for (size_t g = first; g < first + bytes / kGranule; ++g) check_written(g, thread, "access to an mbarrier");
}

void SharedMemory::check_async_object(uint32_t address, int bytes, int thread) {
  check_object(address, bytes, thread);
  const size_t first = granule(address, bytes, "access to an mbarrier");
  for (size_t g = first; g < first + bytes / kGranule; ++g) {
    check_fenced(g, thread, "a bulk copy counts at an mbarrier, reading");
  }
}

}  // namespace ptx
