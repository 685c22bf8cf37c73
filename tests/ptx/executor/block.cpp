#include "block.h"

#include <algorithm>
#include <bit>

namespace ptx {
namespace {

constexpr int kRegisterFile = 65536;
// Of a block that has bulk copies.
constexpr int kBarrierClocks = 32;

int lowest(uint32_t mask) { return std::countr_zero(mask); }

}  // namespace

Warp::Warp(Block& block, int number) : block_(block), number_(number) {
  const Kernel& kernel = block.kernel;
  const int left = block.launch.threads - number * kLanes;
  live_ = left >= kLanes ? kAllLanes : (1u << left) - 1;
  fragments.push_back({0, live_});
  values_.resize(static_cast<size_t>(kernel.registers) * kLanes);
  defined.resize(kernel.registers);
  pending.resize(kernel.has_wgmma ? kernel.registers : 0);
  touched.resize(kernel.has_wgmma ? kernel.registers : 0, 1);
  for (const auto& [number_of, value] : kernel.constants) {
    std::fill_n(reg(number_of), kLanes, value);
    defined[number_of] = kAllLanes;
  }
  for (const auto& [number_of, name] : kernel.specials) {
    defined[number_of] = kAllLanes;
    for (int lane = 0; lane < kLanes; ++lane) {
      uint64_t value = 0;
      if (name == "%tid.x") {
        value = thread(lane);
      } else if (name == "%ntid.x") {
        value = block.launch.threads;
      } else if (name == "%laneid") {
        value = lane;
      } else if (name == "%warpid") {
        value = number;
      } else if (name.rfind("%ctaid.", 0) == 0) {
        value = block.place[name.back() - 'x'];
      } else if (name.rfind("%nctaid.", 0) == 0) {
        value = block.launch.grid[name.back() - 'x'];
      } else if (name == "%tid.y" || name == "%tid.z") {
        value = 0;
      } else if (name == "%ntid.y" || name == "%ntid.z") {
        value = 1;
      } else {
        throw Fault("unknown special register " + name);
      }
      reg(number_of)[lane] = value;
    }
  }
}

Accessor Warp::accessor(int lane) const {
  const int own = thread(lane);
  return {block_.clocks, own, static_cast<uint32_t>(block_.number * block_.launch.threads + own + 1)};
}

uint32_t Warp::guarded(const Instruction& i, uint32_t mask) {
  if (i.guard < 0) return mask;
  if (block_.launch.options.check_undefined && (defined[i.guard] & mask) != mask) {
    throw Fault("predicate " + block_.kernel.register_names[i.guard] + " has no value");
  }
  const uint64_t* values = reg(i.guard);
  uint32_t holds = 0;
  for (int lane = 0; lane < kLanes; ++lane) holds |= static_cast<uint32_t>(values[lane] & 1) << lane;
  return mask & (i.negated ? ~holds : holds);
}

void Warp::check_sources(const Instruction& i, uint32_t mask) const {
  for (const int r : i.from) {
    if ((defined[r] & mask) == mask) continue;
    const std::string& name = block_.kernel.register_names[r];
    if (!pending.empty() && pending[r] != 0) {
      throw Fault("register " + name + " belongs to a product that was not waited for");
    }
    if (block_.launch.options.check_undefined) throw Fault("register " + name + " has no value");
  }
}

void Warp::mark_results(const Instruction& i, uint32_t mask) {
  for (const int r : i.to) {
    if (r < 0) continue;
    defined[r] |= mask;
    if (!pending.empty()) {
      if (pending[r] != 0) {
        throw Fault("register " + block_.kernel.register_names[r] + " belongs to a product that was not waited for");
      }
      touched[r] = 1;
    }
  }
}

// The compiler renames registers between products by moves, which the assembler takes away.
void Warp::move_marks(const Instruction& i, uint32_t mask) {
  const int to = i.to[0], from = i.from[0];
  defined[to] = (defined[to] & ~mask) | (defined[from] & mask);
  if (pending.empty()) return;
  pending[to] = pending[from];
  touched[to] = touched[from];
}

void Warp::land(int lane, uint64_t before_group, uint64_t before_number) {
  std::vector<Copy>& list = copies[lane].pending;
  size_t kept = 0;
  for (const Copy& copy : list) {
    if (copy.group >= before_group || copy.number >= before_number) {
      list[kept++] = copy;
      continue;
    }
    uint8_t* to = block_.shared.land_copy(copy.to, copy.bytes, thread(lane));
    std::fill_n(to, copy.bytes, uint8_t{0});
    if (copy.copied > 0) std::copy_n(reinterpret_cast<const uint8_t*>(copy.from), copy.copied, to);
  }
  list.resize(kept);
}

void Warp::finish_products(size_t left) {
  // A group that was not committed is not waited for.
  const size_t open = !product_groups.empty() && product_groups.back().number == open_products;
  while (product_groups.size() > left + open) {
    const ProductGroup& group = product_groups.front();
    for (const auto& [address, bytes] : group.reads) block_.shared.end_async_read(address, bytes, thread(0));
    for (size_t r = 0; r < pending.size(); ++r) {
      if (pending[r] != group.number) continue;
      pending[r] = 0;
      defined[r] = kAllLanes;
    }
    product_groups.erase(product_groups.begin());
  }
}

// Makes one of all fragments at the same place; `fragment` follows the one that is meant.
bool Warp::merge(size_t& fragment) {
  bool merged = false;
  for (size_t other = 0; other < fragments.size(); ++other) {
    if (other == fragment || fragments[other].at != fragments[fragment].at) continue;
    const State state = fragments[other].state;
    if (state != State::kReady && state != State::kGathering) continue;
    fragments[fragment].mask |= fragments[other].mask;
    fragments.erase(fragments.begin() + other);
    if (other < fragment) --fragment;
    --other;
    merged = true;
  }
  return merged;
}

// Whether the fragment has to stay where it is.
bool Warp::wait_here(Fragment& f, const Instruction& i, uint32_t mask) {
  if (i.kind == Kind::kConverged || i.kind == Kind::kProduct || i.kind == Kind::kBarrier) {
    if (f.mask != live_) {
      f.state = State::kGathering;
      return true;
    }
    // A guard that holds for some lanes only would take the warp apart at an instruction that must not be.
    if (mask != f.mask && mask != 0) throw Fault("lanes of a warp differ about an instruction that all have to run");
  }
  if (mask == 0) return false;
  if (i.kind == Kind::kBarrier) {
    f.state = State::kAtBarrier;
    f.barrier = static_cast<int>(reg(i.from[0])[0]);
    f.expected = i.from.size() > 1 ? static_cast<int>(reg(i.from[1])[0]) : 0;
    if (f.expected % kLanes != 0) throw Fault("a barrier for a part of a warp");
    return true;
  }
  if (i.kind == Kind::kTryWait) {
    const int lane = lowest(mask);
    const auto address = static_cast<uint32_t>(reg(i.from[0])[lane] + i.offset);
    const auto parity = static_cast<uint32_t>(reg(i.from[1])[lane]) & 1;
    for (int other = 0; other < kLanes; ++other) {
      if ((mask >> other & 1) == 0) continue;
      if (static_cast<uint32_t>(reg(i.from[0])[other] + i.offset) != address ||
          (static_cast<uint32_t>(reg(i.from[1])[other]) & 1) != parity) {
        throw Fault("lanes of a warp wait for different phases");
      }
    }
    Mbarrier& barrier = block_.mbarrier(address, thread(lane));
    // The phase of this parity is complete where another one is current.
    if ((barrier.phase & 1) == parity) {
      f.state = State::kAtMbarrier;
      f.address = address;
      f.parity = parity;
      return true;
    }
    for (int other = 0; other < kLanes; ++other) {
      if ((mask >> other & 1) == 0) continue;
      block_.clocks.acquire(thread(other), barrier.complete);
      reg(i.to[0])[other] = 1;
    }
  }
  return false;
}

void Warp::run(size_t fragment, int instructions) {
  const std::vector<Instruction>& code = block_.kernel.code;
  for (; instructions > 0; --instructions) {
    if (fragments.size() > 1) merge(fragment);
    Fragment& f = fragments[fragment];
    f.state = State::kReady;
    if (f.at >= static_cast<int>(code.size())) throw Fault("the kernel's code ends without ret");
    const Instruction& i = code[f.at];
    try {
      const uint32_t mask = guarded(i, f.mask);
      if (mask != 0 && i.kind != Kind::kMove) check_sources(i, mask);
      if (wait_here(f, i, mask)) {
        if (f.state == State::kAtBarrier) block_.check_barriers();
        if (f.state == State::kAtMbarrier || fragments[fragment].state != State::kReady) return;
        return;
      }
      switch (i.kind) {
        case Kind::kBranch:
          if (mask == f.mask) {
            f.at = i.target;
          } else {
            ++f.at;
            if (mask != 0) {
              f.mask &= ~mask;
              fragments.push_back({i.target, mask});
              return;
            }
          }
          continue;
        case Kind::kReturn: {
          live_ &= ~mask;
          f.mask &= ~mask;
          ++f.at;
          if (f.mask == 0) fragments.erase(fragments.begin() + fragment);
          if (mask != 0) {
            for (Fragment& other : fragments) {
              if (other.state == State::kGathering) other.state = State::kReady;
            }
            for (int lane = 0; lane < kLanes; ++lane) {
              if (mask >> lane & 1) land(lane, ~uint64_t{0}, ~uint64_t{0});
            }
            block_.lanes_ended();
            return;
          }
          continue;
        }
        case Kind::kTrap:
          if (mask != 0) throw Fault("trap");
          break;
        case Kind::kMove:
          if (mask != 0) {
            i.run(*this, i, mask);
            move_marks(i, mask);
          }
          break;
        default:
          if (mask != 0) {
            if (i.run != nullptr) i.run(*this, i, mask);
            if (blocked) {
              blocked = false;
              f.state = State::kAtRegisters;
              return;
            }
            if (i.kind != Kind::kProduct) mark_results(i, mask);
          }
      }
      ++f.at;
    } catch (const Fault& fault) {
      throw Fault("kernel " + block_.kernel.name + ", line " + std::to_string(i.line) + ": " + i.text + ": " +
                  fault.what() + " (block " + std::to_string(block_.place[0]) + ", " + std::to_string(block_.place[1]) +
                  ", warp " + std::to_string(number_) + ", seed " + std::to_string(block_.launch.options.seed) + ")");
    }
  }
}

Block::Block(const Launch& l, int x, int y, int z, uint64_t number_of)
    : launch(l),
      kernel(*l.kernel),
      place{x, y, z},
      number(number_of),
      clocks(l.threads, l.kernel->has_bulk ? kBarrierClocks : 0, l.kernel->has_wgmma || l.kernel->has_bulk),
      shared(l.shared_bytes + l.kernel->static_shared_bytes, clocks, l.options.check_uninitialised),
      random(l.options.seed * 1000003 + number_of) {
  const int count = (l.threads + kLanes - 1) / kLanes;
  const int each = kRegisterFile / l.threads / 8 * 8;
  for (int w = 0; w < count; ++w) {
    warps.push_back(std::make_unique<Warp>(*this, w));
    warps.back()->maximum_registers = std::min(each, 255);
  }
}

Mbarrier& Block::mbarrier(uint32_t address, int thread) {
  const auto found = mbarriers.find(address);
  if (found == mbarriers.end()) throw Fault("no mbarrier was initialised there");
  shared.check_object(address, 8, thread);
  return found->second;
}

void Block::arrive(uint32_t address, int thread, int64_t bytes) {
  Mbarrier& barrier = mbarrier(address, thread);
  if (barrier.pending == 0) throw Fault("more arrivals at an mbarrier than its phase is for");
  clocks.release(thread, barrier.arriving);
  barrier.bytes += bytes;
  --barrier.pending;
  complete_phase(address, barrier);
}

void Block::complete_phase(uint32_t address, Mbarrier& barrier) {
  if (barrier.pending > 0 || barrier.bytes != 0) return;
  barrier.complete = barrier.arriving;
  barrier.pending = barrier.count;
  ++barrier.phase;
  for (const auto& warp : warps) {
    for (Fragment& f : warp->fragments) {
      if (f.state == State::kAtMbarrier && f.address == address && (barrier.phase & 1) != f.parity) {
        f.state = State::kReady;
      }
    }
  }
}

// Lets those go who wait at a barrier at which all have arrived.
void Block::check_barriers() {
  for (int id = 0; id < 16; ++id) {
    int arrived = 0, expected = -1;
    for (const auto& warp : warps) {
      for (const Fragment& f : warp->fragments) {
        if (f.state != State::kAtBarrier || f.barrier != id) continue;
        arrived += std::popcount(f.mask);
        const int wanted = f.expected == 0 ? launch.threads : f.expected;
        if (expected >= 0 && wanted != expected) throw Fault("threads meet at a barrier with different counts");
        expected = wanted;
      }
    }
    if (expected < 0 || arrived < expected) continue;
    if (arrived > expected) throw Fault("more threads at a barrier than it is for");
    std::vector<int> threads;
    for (const auto& warp : warps) {
      for (Fragment& f : warp->fragments) {
        if (f.state != State::kAtBarrier || f.barrier != id) continue;
        f.state = State::kReady;
        ++f.at;
        for (int lane = 0; lane < kLanes; ++lane) {
          if (f.mask >> lane & 1) threads.push_back(warp->thread(lane));
        }
      }
    }
    clocks.join(threads);
  }
}

// Lets one of what is under way happen; false where nothing is.
bool Block::land_something() {
  const size_t count = arrivals.size() + bulk_copies.size();
  if (count == 0) return false;
  const size_t drawn = random() % count;
  try {
    if (drawn < arrivals.size()) {
      fire_arrival(drawn);
    } else {
      land_bulk_copy(drawn - arrivals.size());
    }
  } catch (const Fault& fault) {
    throw Fault("kernel " + kernel.name + ", when a copy lands: " + fault.what());
  }
  return true;
}

void Block::fire_arrival(size_t drawn) {
  // Those of one lane happen in order.
  size_t chosen = drawn;
  for (size_t i = 0; i < drawn; ++i) {
    if (arrivals[i].warp == arrivals[drawn].warp && arrivals[i].lane == arrivals[drawn].lane) {
      chosen = i;
      break;
    }
  }
  const PendingArrival arrival = arrivals[chosen];
  arrivals.erase(arrivals.begin() + chosen);
  Warp& warp = *warps[arrival.warp];
  warp.land(arrival.lane, ~uint64_t{0}, arrival.number);
  arrive(arrival.address, warp.thread(arrival.lane));
}

void Block::land_bulk_copy(size_t drawn) {
  const BulkCopy copy = bulk_copies[drawn];
  bulk_copies.erase(bulk_copies.begin() + drawn);
  Mbarrier& barrier = mbarriers.at(copy.address);
  uint8_t* to = shared.land_bulk_copy(copy.to, copy.bytes, barrier.clock_number, ++barrier.clock);
  std::copy_n(reinterpret_cast<const uint8_t*>(copy.from), copy.bytes, to);
  clocks.leave(barrier.clock_number, barrier.clock, barrier.arriving);
  barrier.bytes -= copy.bytes;
  complete_phase(copy.address, barrier);
}

void Block::stuck() const {
  std::string text = "kernel " + kernel.name + ": no thread can go on";
  for (const auto& warp : warps) {
    for (const Fragment& f : warp->fragments) {
      const Instruction& i = kernel.code[f.at];
      text += "; warp " + std::to_string(warp->number_) + " waits at line " + std::to_string(i.line) + ": " + i.text;
      if (f.mask != warp->live()) text += " (with some of its lanes)";
    }
  }
  throw Fault(text + " (block " + std::to_string(place[0]) + ", " + std::to_string(place[1]) + ", seed " +
              std::to_string(launch.options.seed) + ")");
}

void Block::run() {
  std::vector<std::pair<int, int>> ready;
  while (true) {
    ready.clear();
    bool any = false;
    for (const auto& warp : warps) {
      int lowest_at = -1;
      for (size_t f = 0; f < warp->fragments.size(); ++f) {
        any = true;
        if (warp->fragments[f].state != State::kReady) continue;
        // The one that is furthest behind, which lets fragments meet; now and then another one.
        if (lowest_at < 0 || warp->fragments[f].at < warp->fragments[lowest_at].at) lowest_at = static_cast<int>(f);
        if (random() % 8 == 0) break;
      }
      if (lowest_at >= 0) ready.emplace_back(warp->number_, lowest_at);
    }
    if (!any) {
      // Copies that nobody waits for land after the block's end, where bulk copies must not.
      if (!bulk_copies.empty()) throw Fault("kernel " + kernel.name + ": a block ends while a bulk copy is under way");
      return;
    }
    if (ready.empty() || (!(arrivals.empty() && bulk_copies.empty()) && random() % 64 == 0)) {
      if (land_something()) continue;
      if (ready.empty()) stuck();
    }
    const auto [w, f] = ready[random() % ready.size()];
    // Some bursts last until the warp has to wait, most are short.
    const uint64_t draw = random();
    const int length = draw % 4 == 0 ? 1 << 20 : 1 + static_cast<int>(draw / 4 % 200);
    warps[w]->run(f, length);
  }
}

void run(Launch& launch) {
  launch.global->begin_launch();
  if (!launch.named.empty()) launch.global->restrict_to(launch.named);
  std::vector<int64_t> order(static_cast<int64_t>(launch.grid[0]) * launch.grid[1] * launch.grid[2]);
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int64_t>(i);
  std::mt19937_64 random(launch.options.seed);
  std::shuffle(order.begin(), order.end(), random);
  for (const int64_t number : order) {
    const int64_t plane = static_cast<int64_t>(launch.grid[0]) * launch.grid[1];
    Block block(launch, static_cast<int>(number % launch.grid[0]), static_cast<int>(number % plane / launch.grid[0]),
                static_cast<int>(number / plane), static_cast<uint64_t>(number));
    block.run();
  }
}

}  // namespace ptx
