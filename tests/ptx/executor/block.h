// One block at work: warps with a program counter for each lane, barriers, asynchronous copies and products.
//
// Lanes of a warp that stand at the same instruction are a fragment and run together. A branch that lanes take
// differently splits a fragment, and fragments that meet become one again. Instructions that the whole warp has to run
// (`.sync.aligned`) hold a fragment until all lanes that have not ended are there; where they never come, the launch
// ends with a Fault that says who waits for what.
//
// Nothing happens earlier than it has to: copies land when they are waited for, or when nothing else can go on; bulk
// copies, which land at an mbarrier, then or at a moment drawn from the seed. Which warp runs next, and for how many
// instructions, is drawn from the seed.
#pragma once

#include <random>

#include "memory.h"

namespace ptx {

struct Options {
  uint64_t seed = 0;
  bool truncate = false;            // sums of tensor cores are rounded towards zero, step by step
  bool check_undefined = true;      // registers
  bool check_uninitialised = true;  // shared memory
};

struct Launch {
  const Kernel* kernel;
  int grid[3], threads;
  int64_t shared_bytes;
  std::vector<uint8_t> parameters;
  Options options;
  GlobalMemory* global;
  std::vector<uint64_t> named;  // where not empty: only tensors that hold one of these addresses may be touched
};

enum class State : uint8_t { kReady, kGathering, kAtBarrier, kAtMbarrier, kAtRegisters };

struct Fragment {
  int at;
  uint32_t mask;
  State state = State::kReady;
  int barrier = 0;       // at a barrier
  int expected = 0;      // threads that it waits for; 0: all of the block
  uint32_t address = 0;  // of an mbarrier
  uint32_t parity = 0;
};

// A copy of a lane from global to shared memory.
struct Copy {
  uint32_t to;
  uint64_t from;
  int bytes, copied;
  uint64_t group, number;
};

struct LaneCopies {
  std::vector<Copy> pending;
  uint64_t group = 0, number = 0;
};

struct ProductGroup {
  uint32_t number;
  std::vector<std::pair<uint32_t, int>> reads;
};

class Block;

class Warp {
 public:
  Warp(Block& block, int number);
  // Runs some instructions of a fragment; false where it could not go on.
  void run(size_t fragment, int instructions);

  uint64_t* reg(int number) { return &values_[static_cast<size_t>(number) * kLanes]; }
  int thread(int lane) const { return number_ * kLanes + lane; }
  Accessor accessor(int lane) const;
  Block& block() { return block_; }
  uint32_t live() const { return live_; }

  Block& block_;
  int number_;
  uint32_t live_;
  std::vector<Fragment> fragments;
  LaneCopies copies[kLanes];
  int maximum_registers = 0;
  bool blocked = false;  // set by setmaxnreg where too few registers are free

  // Of registers: lanes that have a value; the product under way that writes them; whether an instruction other than
  // a product has written them since the last wgmma.fence.
  std::vector<uint32_t> defined, pending;
  std::vector<uint8_t> touched;
  uint32_t open_products = 1;
  std::vector<ProductGroup> product_groups;
  void finish_products(size_t left);
  void land(int lane, uint64_t before_group, uint64_t before_number);

 private:
  uint32_t guarded(const Instruction& i, uint32_t mask);
  void check_sources(const Instruction& i, uint32_t mask) const;
  void mark_results(const Instruction& i, uint32_t mask);
  void move_marks(const Instruction& i, uint32_t mask);
  bool wait_here(Fragment& f, const Instruction& i, uint32_t mask);
  bool merge(size_t& fragment);
  std::vector<uint64_t> values_;
};

struct Mbarrier {
  int count = 0, pending = 0;
  int64_t bytes = 0;  // that the phase waits for; below 0 where copies land before they are expected
  uint64_t phase = 0;
  int clock_number = 0;  // among the clocks
  uint32_t clock = 0;
  Clocks::Mail arriving, complete;
};

// An arrival that happens when a lane's copies have landed.
struct PendingArrival {
  int warp, lane;
  uint64_t number;
  uint32_t address;
};

// A bulk copy under way, and the mbarrier that counts it.
struct BulkCopy {
  uint32_t to;
  uint64_t from;
  int bytes;
  uint32_t address;
};

class Block {
 public:
  Block(const Launch& launch, int x, int y, int z, uint64_t number);
  void run();

  const Launch& launch;
  const Kernel& kernel;
  int place[3];
  uint64_t number;
  Clocks clocks;
  SharedMemory shared;
  std::mt19937_64 random;
  std::map<uint32_t, Mbarrier> mbarriers;
  std::vector<PendingArrival> arrivals;
  std::vector<BulkCopy> bulk_copies;
  std::vector<std::unique_ptr<Warp>> warps;
  int free_registers = 0;

  // An arrival that lets the phase wait for `bytes` more.
  void arrive(uint32_t address, int thread, int64_t bytes = 0);
  void check_barriers();
  void lanes_ended() { check_barriers(); }
  Mbarrier& mbarrier(uint32_t address, int thread);

 private:
  bool land_something();
  void fire_arrival(size_t drawn);
  void land_bulk_copy(size_t drawn);
  void complete_phase(uint32_t address, Mbarrier& barrier);
  [[noreturn]] void stuck() const;
};

void run(Launch& launch);

}  // namespace ptx
