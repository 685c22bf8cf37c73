// A block of warpgroups on the host: the same text as on the device, one fibre for each group, for tests without a GPU.
//
// A group runs until a barrier keeps it waiting; copies arrive as late as can be, when every group waits. Withheld or
// checked, besides what warpgroup_memory.h says:
//  - a barrier passes when as many have arrived as it was made for; groups that all wait for nothing are an error;
//  - products see what copies wrote only behind a fence, and read until they are waited for; their sums are touched
//    neither before that nor, without a fence, after others have written them;
//  - registers are taken when there are enough.
// Descriptors and products follow the tables of the PTX manual (wgmma.mma_async m64nNk16, K-major, 128-byte swizzle),
// written out here and not taken from matrix_descriptor.h, which they check.
#pragma once

#include <ucontext.h>

#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <vector>

#include "backends/cuda/kernels/block_parts.h"
#include "backends/cuda/kernels/matrix_descriptor.h"
#include "backends/cuda/simulate/warpgroup_memory.h"

namespace bap_kernels {

// Fibres that run one at a time, each until it waits.
class Fibres {
 public:
  // Runs body(0) to body(count - 1) to their ends; `arrive` makes something happen that a waiting fibre may wait for,
  // false where there is nothing.
  void run(int count, const std::function<void(int)>& body, const std::function<bool()>& arrive) {
    body_ = &body;
    for (int i = 0; i < count; ++i) {
      fibres_.push_back(std::make_unique<Fibre>());
      Fibre& fibre = *fibres_.back();
      getcontext(&fibre.context);
      fibre.context.uc_stack.ss_sp = fibre.stack.data();
      fibre.context.uc_stack.ss_size = fibre.stack.size();
      fibre.context.uc_link = &main_;
      const auto self = reinterpret_cast<uintptr_t>(this);
      makecontext(&fibre.context, reinterpret_cast<void (*)()>(&Fibres::enter), 3, static_cast<unsigned>(self >> 32),
                  static_cast<unsigned>(self), i);
    }
    bool over = false;
    while (!over) {
      over = true;
      bool moved = false;
      // The last group first: it copies as far ahead as it may.
      for (current_ = count - 1; current_ >= 0; --current_) {
        Fibre& fibre = *fibres_[current_];
        if (fibre.over) continue;
        over = false;
        fibre.waits = false;
        swapcontext(&main_, &fibre.context);
        if (fibre.error) std::rethrow_exception(fibre.error);
        moved = moved || !fibre.waits || fibre.passed;
        fibre.passed = false;
      }
      if (!over && !moved && !arrive()) throw std::logic_error("simulated warpgroups: all of them wait for ever");
    }
    current_ = -1;
  }
  // The running fibre waits until `holds`.
  template <class Condition>
  void wait(Condition holds) {
    Fibre& fibre = *fibres_[current_];
    while (!holds()) {
      fibre.waits = true;
      swapcontext(&fibre.context, &main_);
    }
    fibre.passed = true;
  }
  int current() const { return current_; }

 private:
  struct Fibre {
    ucontext_t context{};
    std::vector<char> stack = std::vector<char>(256 * 1024);
    bool over = false, waits = false, passed = false;
    std::exception_ptr error;
  };

  static void enter(unsigned high, unsigned low, int number) {
    auto* self = reinterpret_cast<Fibres*>(static_cast<uintptr_t>(high) << 32 | low);
    Fibre& fibre = *self->fibres_[number];
    try {
      (*self->body_)(number);
    } catch (...) {
      fibre.error = std::current_exception();
    }
    fibre.over = true;
  }

  std::vector<std::unique_ptr<Fibre>> fibres_;
  const std::function<void(int)>* body_ = nullptr;
  ucontext_t main_{};
  int current_ = -1;
};

template <class State>
class SimulatedWarpgroups {
 public:
  SimulatedWarpgroups(int threads, int shared_bytes, int block_x, int block_y)
      : memory_(shared_bytes),
        states_(threads),
        open_(threads),
        seen_(threads / kWarp, Seen{}),
        visible_(threads / kWarp, Seen{}),
        groups_(threads / kWarpgroup),
        block_x_(block_x),
        block_y_(block_y) {
    for (size_t w = 0; w < seen_.size(); ++w) seen_[w][w] = 1;
    for (Group& group : groups_) group.registers = kBeginRegisters;
  }

  int block_x() const { return block_x_; }
  int block_y() const { return block_y_; }

  // All threads of the block, before its groups part.
  template <class Function>
  void each(Function&& function) {
    for (size_t thread = 0; thread < states_.size(); ++thread) function(static_cast<int>(thread), states_[thread]);
  }
  void sync() { meet(0, static_cast<int>(groups_.size())); }

  template <class Function>
  void groups(Function&& function) {
    const std::function<void(int)> body = function;
    fibres_.run(static_cast<int>(groups_.size()), body, [&] { return arrive_oldest(); });
    require(late_.empty(), "ends while copies are under way");
  }
  template <class Function>
  void each_of_group(Function&& function) {
    Group& group = groups_[fibres_.current()];
    require(group.under_way.empty() && group.open.empty(), "touches sums while products are under way");
    group.fenced = false;
    for (int t = 0; t < kWarpgroup; ++t) {
      const int thread = fibres_.current() * kWarpgroup + t;
      function(thread, states_[thread]);
    }
  }

  void copy_chunk(int thread, int to, const void* from, int bytes) {
    if (bytes < 0 || bytes > kChunkBytes || reinterpret_cast<uintptr_t>(from) % kChunkBytes != 0) {
      throw std::logic_error("simulated warpgroups: a copy of " + std::to_string(bytes) + " bytes is not aligned");
    }
    const int warp = warp_of(thread);
    memory_.begin_copy(warp, seen_[warp], to, kChunkBytes);
    Copy copy{to, {}};
    std::memcpy(copy.data, from, bytes);
    open_[fibres_.current() * kWarpgroup + thread % kWarpgroup].push_back(copy);
  }
  void finish_copies() {}

  void init_barrier(int at, int count) {
    require(barriers_.count(at) == 0 && count > 0, "makes a barrier twice, or for nobody");
    memory_.reserve(at, 8);
    barriers_[at] = Barrier{count, count, 0, {}, {}};
  }
  void wait_barrier(int at, int parity) {
    Barrier& barrier = known(at);
    fibres_.wait([&] { return (barrier.phase & 1) != parity; });
    for_warps([&](int warp) { merge(seen_[warp], barrier.published); });
  }
  void arrive(int at) {
    Barrier& barrier = known(at);
    for_warps([&](int warp) {
      ++seen_[warp][warp];
      arrive_at(barrier, seen_[warp]);
    });
  }
  void arrive_copies(int thread, int at) {
    const int warp = warp_of(thread);
    auto& copies = open_[fibres_.current() * kWarpgroup + thread % kWarpgroup];
    const int32_t step = seen_[warp][warp]++;
    late_.push_back({warp, step, seen_[warp], &known(at), std::move(copies)});
    copies.clear();
  }
  void see_copies() {
    for_warps([&](int warp) { visible_[warp] = seen_[warp]; });
  }
  template <int kCount>
  void sync_groups() {
    meet(0, kCount / kWarpgroup);
  }

  template <int kWanted>
  void give_registers() {
    Group& group = groups_[fibres_.current()];
    require(kWanted % 8 == 0 && kWanted >= 24 && kWanted <= group.registers, "gives registers that it does not have");
    free_registers_ += (group.registers - kWanted) * kWarpgroup;
    group.registers = kWanted;
  }
  template <int kWanted>
  void take_registers() {
    Group& group = groups_[fibres_.current()];
    require(kWanted % 8 == 0 && kWanted <= 256 && kWanted >= group.registers, "takes fewer registers than it has");
    const int more = (kWanted - group.registers) * kWarpgroup;
    fibres_.wait([&] { return free_registers_ >= more; });
    free_registers_ -= more;
    group.registers = kWanted;
  }

  template <typename value_t>
  void store(int thread, int at, value_t value) {
    memory_.write(warp_of(thread), seen_[warp_of(thread)], at, &value, sizeof(value));
  }
  template <typename value_t>
  value_t load(int thread, int at) {
    value_t value;
    memory_.read(warp_of(thread), seen_[warp_of(thread)], at, &value, sizeof(value));
    return value;
  }

  void begin_products() { groups_[fibres_.current()].fenced = true; }
  template <MathMode kMode, int kColumns>
  void multiply_group(int rows_at, int columns_at) {
    const int number = fibres_.current();
    Group& group = groups_[number];
    require(group.fenced, "begins products without a fence");
    std::vector<float> a = operand<kMode>(group, matrix_descriptor(rows_at), 64);
    std::vector<float> b = operand<kMode>(group, matrix_descriptor(columns_at), kColumns);
    // Register d[4 j + 2 h + e] of lane l of warp w: row 16 w + 8 h + l / 4, column 8 j + 2 (l mod 4) + e.
    for (int t = 0; t < kWarpgroup; ++t) {
      State& s = states_[number * kWarpgroup + t];
      const int warp = t / 32, lane = t % 32;
      for (int j = 0; j < kColumns / 8; ++j) {
        for (int r = 0; r < 4; ++r) {
          const float* row = &a[(16 * warp + 8 * (r / 2) + lane / 4) * 16];
          const float* column = &b[(8 * j + 2 * (lane % 4) + r % 2) * 16];
          float sum = 0.0f;
          for (int k = 0; k < 16; ++k) sum += row[k] * column[k];
          s.sums[0][j][r] += sum;
        }
      }
    }
  }
  void commit_products() {
    Group& group = groups_[fibres_.current()];
    group.under_way.push_back(std::move(group.open));
    group.open.clear();
  }
  template <int kLeft>
  void wait_products() {
    Group& group = groups_[fibres_.current()];
    while (group.under_way.size() > kLeft) {
      // A read ends here, whatever the warp has said before.
      for (const Read& read : group.under_way.front())
        memory_.end_read(read.warp, seen_[read.warp][read.warp], read.at, read.count);
      group.under_way.pop_front();
    }
  }

 private:
  // What a thread of a block of 384 begins with; a block has no more than its threads begin with.
  static constexpr int kBeginRegisters = 168;
  struct Copy {
    int to;
    unsigned char data[kChunkBytes];
  };
  struct Barrier {
    int expected, left, phase;
    Seen gathered, published;
  };
  struct Late {
    int warp;
    int32_t step;
    Seen seen;
    Barrier* barrier;
    std::vector<Copy> copies;
  };
  struct Read {
    int warp, at, count;
  };
  struct Group {
    int registers;
    bool fenced = false;
    std::vector<Read> open;
    std::deque<std::vector<Read>> under_way;
  };

  void require(bool holds, const char* what) const {
    if (holds) return;
    throw std::logic_error("simulated warpgroups: group " + std::to_string(fibres_.current()) + " " + what);
  }
  // The warp of a thread, which a group may count from its own first.
  int warp_of(int thread) const {
    const int group = fibres_.current();
    return group < 0 ? thread / kWarp : group * 4 + thread % kWarpgroup / kWarp;
  }
  template <class Body>
  void for_warps(Body body) {
    for (int w = 0; w < 4; ++w) body(fibres_.current() * 4 + w);
  }
  Barrier& known(int at) {
    require(barriers_.count(at) != 0, "uses a barrier that was not made");
    return barriers_.at(at);
  }
  void arrive_at(Barrier& barrier, const Seen& seen) {
    merge(barrier.gathered, seen);
    if (--barrier.left > 0) return;
    barrier.published = barrier.gathered;
    barrier.left = barrier.expected;
    ++barrier.phase;
  }
  // The copies that were started first.
  bool arrive_oldest() {
    if (late_.empty()) return false;
    const Late late = std::move(late_.front());
    late_.pop_front();
    for (const Copy& copy : late.copies) memory_.end_copy(late.warp, late.step, copy.to, copy.data, kChunkBytes);
    arrive_at(*late.barrier, late.seen);
    return true;
  }
  // A barrier of so many groups, from `first` on; all of the block where they have not parted.
  void meet(int first, int count) {
    const bool parted = fibres_.current() >= 0;
    const int from = parted ? fibres_.current() : first, to = parted ? from + 1 : first + count;
    for (int warp = 4 * from; warp < 4 * to; ++warp) {
      ++seen_[warp][warp];
      merge(meeting_.gathered, seen_[warp]);
    }
    meeting_.left += to - from;
    const int phase = meeting_.phase;
    if (meeting_.left == count) {
      meeting_.published = meeting_.gathered;
      meeting_.left = 0;
      ++meeting_.phase;
    } else {
      fibres_.wait([&] { return meeting_.phase != phase; });
    }
    for (int warp = 4 * from; warp < 4 * to; ++warp) merge(seen_[warp], meeting_.published);
  }

  // `rows` x 16 elements as a descriptor says.
  template <MathMode kMode>
  std::vector<float> operand(Group& group, uint64_t descriptor, int rows) {
    const int start = static_cast<int>(descriptor & 0x3fff) * 16;
    const int stride = static_cast<int>(descriptor >> 32 & 0x3fff) * 16;
    require(descriptor >> 62 == 1, "describes another swizzle than that of 128 bytes");
    require((descriptor >> 49 & 7) == 0, "describes a pattern that begins between its multiples");
    std::vector<float> values(rows * 16);
    for (int row = 0; row < rows; ++row) {
      for (int chunk = 0; chunk < 2; ++chunk) {
        const int address = start + row / 8 * stride + row % 8 * 128 + chunk * 16;
        const int at = address ^ ((address >> 7) % 8 * 16);
        const unsigned char* bytes = nullptr;
        for_warps([&](int warp) {
          bytes = memory_.begin_read(warp, visible_[warp], at, 16);
          group.open.push_back({warp, at, 16});
        });
        for (int e = 0; e < 8; ++e) {
          uint16_t word;
          std::memcpy(&word, bytes + 2 * e, 2);
          values[row * 16 + chunk * 8 + e] =
              kMode == MathMode::kBFloat16 ? to_float(BFloat16Word{word}) : to_float(HalfWord{word});
        }
      }
    }
    return values;
  }

  WarpgroupMemory memory_;
  Fibres fibres_;
  std::vector<State> states_;
  std::vector<std::vector<Copy>> open_;
  std::deque<Late> late_;
  std::vector<Seen> seen_, visible_;  // of each warp; the latter by products
  std::vector<Group> groups_;
  std::map<int, Barrier> barriers_;
  Barrier meeting_{0, 0, 0, {}, {}};
  int free_registers_ = 0, block_x_, block_y_;
};

}  // namespace bap_kernels
