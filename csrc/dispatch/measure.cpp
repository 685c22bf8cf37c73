// One measurement of a case. See measure.h.
#include "dispatch/measure.h"

#include <algorithm>
#include <chrono>
#include <exception>
#include <limits>
#include <random>

#include "dispatch/python_hooks.h"

namespace bap_kernels {
namespace {

// A backend must win by this much to be preferred to one before it: less is noise.
constexpr double kMargin = 0.97;
// What is slower than the fastest by this factor leaves its time to the others: after one run, after two, and when the
// least number of rounds is done. A single run may hold page faults and a pause of the process, which are as long as
// the run itself, or many times as long.
constexpr double kHopelessAfterOne = 4, kHopelessAfterTwo = 2, kHopeless = 1.25;
// Fewer rounds than wished are done when the time is exceeded by this factor.
constexpr double kPatience = 2.5;
// Ctrl-C is noticed after this time, and asking costs about a microsecond, more where another thread runs Python.
constexpr double kSecondsDeaf = 0.05;
// Inputs that measuring goes through: more than inner caches hold, and copied in some 10 ms.
constexpr int64_t kPoolBytes = int64_t{32} << 20, kMostInputs = 64;

// The input and copies of it, to be used in turn: within a network a layer finds its input in an outer cache at best,
// but the second candidate to read one tensor would find it in the inner ones. Fewer where memory is short.
std::vector<at::Tensor> input_pool(const at::Tensor& input, int64_t runs) {
  std::vector<at::Tensor> pool = {input};
  const int64_t bytes = std::max<int64_t>(1, static_cast<int64_t>(input.nbytes()));
  // A copy of a tensor with gaps would lie otherwise in memory.
  if (!input.is_non_overlapping_and_dense()) return pool;
  const int64_t count = std::min({kMostInputs, runs, (kPoolBytes + bytes - 1) / bytes});
  try {
    while (static_cast<int64_t>(pool.size()) < count) pool.push_back(input.clone());
  } catch (const std::exception&) {
    // Half of them go, so that the candidates have room.
    pool.resize((pool.size() + 1) / 2);
  }
  return pool;
}

// Less than half of the time may be undisturbed, and a single run may be quicker than any other ever was.
double lower_quartile(std::vector<double> values) {
  const auto quartile = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 4);
  std::nth_element(values.begin(), quartile, values.end());
  return *quartile;
}

class Interrupts {
 public:
  void check() {
    const auto now = std::chrono::steady_clock::now();
    if (std::chrono::duration<double>(now - last_).count() < kSecondsDeaf) return;
    last_ = now;
    check_interrupt();
  }

 private:
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

void drop_slower(std::vector<Candidate>& running, const CandidateSeconds& seconds, double factor) {
  double least = std::numeric_limits<double>::max();
  for (const Candidate r : running) least = std::min(least, seconds[static_cast<int>(r)]);
  const auto slow = [&](Candidate r) { return seconds[static_cast<int>(r)] > factor * least; };
  running.erase(std::remove_if(running.begin(), running.end(), slow), running.end());
}

}  // namespace

Candidate fastest(const std::vector<Candidate>& candidates, const CandidateSeconds& seconds) {
  Candidate best = candidates.front();
  for (const Candidate r : candidates) {
    const double least = seconds[static_cast<int>(best)], own = seconds[static_cast<int>(r)];
    if (own > 0 && (least <= 0 || own < least * kMargin)) best = r;
  }
  return best;
}

Measurement measure(const MeasuredCase& c, const MeasuredDevice& device, const std::vector<Candidate>& candidates,
                    const Effort& effort) {
  std::array<std::vector<double>, kCandidateCount> samples;  // of round 0, 1, ...: who is dropped stays out
  Measurement measured{candidates.front()};
  Interrupts interrupts;
  std::vector<Candidate> running = candidates;
  std::exception_ptr first_error;
  double spent = 0;
  const auto fails = [&](const at::Tensor& input, Candidate r, double& seconds) {
    interrupts.check();
    try {
      seconds = device.seconds(r, [&] { c.run(input, r); });
      spent += seconds;
      return false;
    } catch (...) {
      const std::exception_ptr error = std::current_exception();
      if (is_interrupt(error)) throw;
      if (!first_error) first_error = error;
      return true;
    }
  };

  // A first run packs weights and warms caches and thread pools.
  CandidateSeconds cold{};
  const auto declines = [&](Candidate r) { return fails(c.input, r, cold[static_cast<int>(r)]); };
  running.erase(std::remove_if(running.begin(), running.end(), declines), running.end());
  if (running.empty()) std::rethrow_exception(first_error);
  if (device.first_run_tells && spent > kPatience * effort.seconds) drop_slower(running, cold, kHopelessAfterOne);

  const std::vector<at::Tensor> inputs =
      running.size() == 1 ? std::vector<at::Tensor>{} : input_pool(c.input, effort.max_rounds * running.size());
  size_t turn = 0;
  const auto timed = [&](Candidate r) {
    double seconds = 0;
    if (fails(inputs[turn++ % inputs.size()], r, seconds)) return false;
    samples[static_cast<int>(r)].push_back(seconds);
    return true;
  };
  // Every round has an order of its own: what ran before leaves its tensors in the caches, and a candidate that always
  // follows the same one gains or loses by it.
  std::minstd_rand random(1);
  const auto may_go_on = [&](int round) {
    if (running.size() < 2 || round >= effort.max_rounds) return false;
    return round == 0 || spent < effort.seconds * (round < effort.min_rounds ? kPatience : 1);
  };
  const Candidate able = running.front();
  const double able_seconds = cold[static_cast<int>(able)];
  for (int round = 0; may_go_on(round); ++round) {
    std::shuffle(running.begin(), running.end(), random);
    std::vector<Candidate> alive;
    for (const Candidate r : running) {
      if (timed(r)) {
        alive.push_back(r);
      } else {
        samples[static_cast<int>(r)].clear();
        cold[static_cast<int>(r)] = 0;
      }
    }
    running = std::move(alive);
    if (running.empty()) {
      // Such as for lack of memory beside the copies: the call itself may have enough.
      Measurement none{able};
      none.seconds[static_cast<int>(able)] = able_seconds;
      return none;
    }
    const int done = round + 1;
    for (const Candidate r : running) {
      const int i = static_cast<int>(r);
      // After one run the warm-up counts, too: a pause of the process meets only one of the two.
      measured.seconds[i] = done == 1 ? std::min(cold[i], samples[i].front()) : lower_quartile(samples[i]);
    }
    drop_slower(running, measured.seconds,
                done >= effort.min_rounds ? kHopeless
                : done >= 2               ? kHopelessAfterTwo
                                          : kHopelessAfterOne);
  }

  // What fails has no time. What was dropped after its warm-up keeps that, and one that was never compared wins.
  for (const Candidate r : candidates) {
    const int i = static_cast<int>(r);
    measured.seconds[i] = samples[i].empty() ? cold[i] : lower_quartile(samples[i]);
  }
  measured.winner = running.size() == 1 ? running.front() : fastest(candidates, measured.seconds);
  const std::vector<double>& own = samples[static_cast<int>(measured.winner)];
  const std::vector<double>* rival = nullptr;
  bool hopeless = false;
  for (const Candidate r : candidates) {
    const std::vector<double>& others = samples[static_cast<int>(r)];
    if (r == measured.winner || others.empty()) continue;
    if (rival == nullptr || lower_quartile(others) < lower_quartile(*rival)) {
      rival = &others;
      hopeless = std::find(running.begin(), running.end(), r) == running.end();
    }
  }
  if (rival == nullptr) {
    // Alone from the start, or ahead after the warm-ups already: that is a round, too.
    const auto timed_once = [&](Candidate r) { return cold[static_cast<int>(r)] > 0; };
    measured.rounds = measured.wins = std::count_if(candidates.begin(), candidates.end(), timed_once) > 1 ? 1 : 0;
    return measured;
  }
  measured.rounds = static_cast<int>(std::min(own.size(), rival->size()));
  for (int i = 0; i < measured.rounds; ++i) measured.wins += own[i] <= (*rival)[i];
  // What was left out as hopeless would have lost those rounds, too.
  const int missed = hopeless ? std::max(0, effort.min_rounds - measured.rounds) : 0;
  measured.rounds += missed;
  measured.wins += missed;
  return measured;
}

}  // namespace bap_kernels
