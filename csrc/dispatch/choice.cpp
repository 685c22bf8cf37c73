// Measured choice of a backend: which cases are known, and when one is measured again. See choice.h.
#include "dispatch/choice.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <unordered_set>
#include <utility>

#include "dispatch/bounded_map.h"
#include "dispatch/choice_file.h"
#include "dispatch/measure.h"
#include "dispatch/packed_cache.h"
#include "dispatch/python_hooks.h"

namespace bap_kernels {
namespace {

// A case at its first call. The more cases a process measures, the less time each gets: n of them take kSecondsPerCase
// * kFullCases * (1 + ln(n / kFullCases)) in all, and a round of each that stays.
constexpr double kSecondsPerCase = 0.1;
constexpr int64_t kFullCases = 128;
constexpr int kMinRounds = 8, kMaxRounds = 32;
// Measured again: a few rounds, as soon as this share of the time in the case pays for them beyond a first allowance,
// and not before a busy minute has passed; twice as long each time after that.
constexpr int kRoundsAgain = 6;
constexpr double kShare = 0.02, kAllowance = 0.01, kSecondsApart = 60;
// A choice is settled by kAgreeing measurements in a row where it wins more than kSure of the rounds. One that stays
// close or noisy is settled by kEnough in a row: its rival is as good. One that changes is given up on after kMost.
constexpr int kAgreeing = 2, kEnough = 4, kMost = 8;
constexpr double kSure = 0.75;
// Other software, cooling and neighbours: after a month a settled choice is measured once more.
constexpr double kSecondsValid = 30 * 86400.;
// Cases that are remembered; 10 MB.
constexpr size_t kMostCases = 1 << 14;
constexpr uint32_t kNever = std::numeric_limits<uint32_t>::max();

}  // namespace

double Choice::confidence() const {
  return measurements == 0 ? 1 : static_cast<double>(wins + 1) / static_cast<double>(rounds + 2);
}

double Choice::margin() const {
  double rival = std::numeric_limits<double>::infinity();
  for (int r = 0; r < kCandidateCount; ++r) {
    if (r != static_cast<int>(candidate) && seconds[r] > 0) rival = std::min(rival, seconds[r]);
  }
  return rival / seconds[static_cast<int>(candidate)];
}

bool Choice::settled(double now) const {
  if (measurements == 0) return true;
  if (now - measured_at > kSecondsValid) return false;
  return (agreeing >= kAgreeing && confidence() > kSure) || agreeing >= kEnough || measurements >= kMost;
}

namespace {

// What a call finds in the table. Candidates that were not measured in this process are due at once where they are not
// settled.
struct Known {
  std::shared_ptr<const Choice> choice;  // its own: the table of all choices may have forgotten it
  uint32_t calls = 0;
  uint32_t due = kNever;  // the call that asks whether to measure again
  double spent = 0;       // seconds of this process in measuring again
  uint64_t verdicts = 0;  // the generation of the device's verdicts that the choice holds for
};

uint64_t generation_of(const MeasuredDevice& device) {
  return device.is_gpu() ? Verdicts::instance().generation(device.number) : 0;
}

CandidateSet set_of_all(const std::vector<Candidate>& candidates) {
  CandidateSet all = 0;
  for (const Candidate r : candidates) all |= set_of(r);
  return all;
}

// Without those that have failed; all of them where none would be left.
std::vector<Candidate> without(const std::vector<Candidate>& candidates, CandidateSet failed) {
  std::vector<Candidate> rest;
  std::copy_if(candidates.begin(), candidates.end(), std::back_inserter(rest),
               [&](Candidate r) { return (failed & set_of(r)) == 0; });
  return rest.empty() ? candidates : rest;
}

// Seconds of a second measurement, as far as the first one tells: every candidate runs, those that are hopeless drop
// out after two rounds, and the first run of each may find the cache of packed weights cleared.
double cost_again(const Choice& choice) {
  const double best = choice.seconds[static_cast<int>(choice.candidate)];
  double cost = 0;
  for (const double t : choice.seconds) cost += t * (t < 2 * best ? 1 + kRoundsAgain : 3);
  return cost;
}

// The call at which measuring again is within its share of the time in the case.
uint32_t due_call(const Choice& choice, const Known& known, double now) {
  if (choice.settled(now)) return kNever;
  const double best = std::max(1e-9, choice.seconds[static_cast<int>(choice.candidate)]);
  const double calls = std::ceil((known.spent + cost_again(choice) - kAllowance) / (kShare * best));
  return static_cast<uint32_t>(std::clamp(calls, known.calls + 1., kNever - 1.));
}

// When that is not the time: a busy minute may not have passed.
bool too_early(const Choice& choice, double now) {
  const double age = now - choice.measured_at;
  return age >= 0 && age < kSecondsApart * static_cast<double>(1 << std::max(0, choice.measurements - 1));
}

// Two measurements of a case as one. A disturbance only ever adds time, so of each candidate the lesser one counts.
Choice combined(const Choice& known, const Measurement& measured, const std::vector<Candidate>& candidates,
                double now) {
  Choice result = known;
  for (const Candidate r : candidates) {
    const int i = static_cast<int>(r);
    if (measured.seconds[i] <= 0) continue;
    result.seconds[i] = known.seconds[i] > 0 ? std::min(known.seconds[i], measured.seconds[i]) : measured.seconds[i];
  }
  result.candidate = fastest(candidates, result.seconds);
  result.measurements = known.measurements + 1;
  result.weighed = known.weighed | set_of_all(candidates);
  result.measured_at = now;
  // Rounds that another one won were lost by this one.
  result.rounds = known.rounds + measured.rounds;
  result.wins = (result.candidate == known.candidate ? known.wins : 0) +
                (result.candidate == measured.winner ? measured.wins : 0);
  const bool agrees = result.candidate == known.candidate && result.candidate == measured.winner;
  result.agreeing = agrees ? known.agreeing + 1 : 1;
  return result;
}

}  // namespace

struct ChoiceTable::State {
  std::mutex mutex;
  BoundedMap<CaseKey, Known, CaseKeyHash> known{kMostCases};
  BoundedMap<std::string, std::shared_ptr<const Choice>> choices{kMostCases};
  std::unordered_set<std::string> measuring;  // cases that some thread measures now
  ChoiceFile file{"", ""};
  bool loaded = true;
  int64_t measured = 0;  // cases at their first call

  void load() {
    if (loaded) return;
    loaded = true;
    for (const Choice& choice : file.read()) choices.put(choice.key, std::make_shared<const Choice>(choice));
  }

  void keep(const CaseKey& key, const Choice& choice, Known known) {
    known.choice = std::make_shared<const Choice>(choice);
    choices.put(choice.key, known.choice);
    this->known.put(key, std::move(known));
    if (choice.measurements > 0) file.append(choice);
  }
};

namespace {

// Marks a case as being measured until the scope ends; false where another thread measures it.
class Measuring {
 public:
  Measuring(std::mutex& mutex, std::unordered_set<std::string>& all, const std::string& key)
      : mutex_(mutex), all_(all), key_(key) {
    std::lock_guard<std::mutex> lock(mutex_);
    mine = all_.insert(key_).second;
  }
  ~Measuring() {
    std::lock_guard<std::mutex> lock(mutex_);
    if (mine) all_.erase(key_);
  }
  Measuring(const Measuring&) = delete;
  Measuring& operator=(const Measuring&) = delete;

  bool mine = false;

 private:
  std::mutex& mutex_;
  std::unordered_set<std::string>& all_;
  const std::string key_;
};

}  // namespace

ChoiceTable::ChoiceTable() : state_(new State()) {}

ChoiceTable& ChoiceTable::instance() {
  static auto* table = new ChoiceTable();
  return *table;
}

Candidate ChoiceTable::choose(const MeasuredCase& c, const MeasuredDevice& device) {
  // Before the candidates are listed: verdicts that change afterwards are looked at by the next call.
  const uint64_t verdicts = generation_of(device);
  std::shared_ptr<const Choice> choice;
  {
    std::lock_guard<std::mutex> lock(state_->mutex);
    Known* known = state_->known.get(c.key);
    if (known != nullptr && known->verdicts == verdicts) {
      if (++known->calls != known->due) return known->choice->candidate;
      known->due = kNever;  // one thread measures; the others go on with what is known
      choice = known->choice;
    }
  }
  const bool due = choice != nullptr;
  // Outside the lock: both may ask Python, whose lock another thread may hold while it waits for this one.
  const std::vector<Candidate> listed = c.candidates();
  const double now = device.now();
  const std::string text = due ? choice->key : c.text();
  std::string warning;
  if (!due) {
    std::lock_guard<std::mutex> lock(state_->mutex);
    state_->load();
    warning = state_->file.take_warning();
    const std::shared_ptr<const Choice>* found = state_->choices.get(text);
    if (found != nullptr) choice = *found;
  }
  if (!warning.empty()) warn(warning);
  Choice fresh{text, listed.front()};
  std::vector<Candidate> candidates = listed;
  Candidate unmeasured = listed.front();
  if (choice != nullptr) {
    fresh.declined = choice->declined;
    candidates = without(listed, choice->declined);
    const CandidateSet all = set_of_all(candidates);
    const bool covered = (choice->measurements > 0 || candidates.size() == 1) && (all & set_of(choice->candidate)) != 0;
    if (covered && (all & ~choice->weighed) == 0) {
      if (due) return measure_again(c, device, *choice, candidates);
      std::lock_guard<std::mutex> lock(state_->mutex);
      Known known{choice, 1};
      known.due = due_call(*choice, known, now);
      known.verdicts = verdicts;
      state_->known.put(c.key, std::move(known));
      return choice->candidate;
    }
    unmeasured = covered ? choice->candidate : fastest(candidates, choice->seconds);
  }
  return measure_first(c, device, std::move(fresh), candidates, unmeasured, verdicts);
}

Candidate ChoiceTable::measure_first(const MeasuredCase& c, const MeasuredDevice& device, Choice choice,
                                     const std::vector<Candidate>& candidates, Candidate unmeasured,
                                     uint64_t verdicts) {
  Known known{nullptr, 1};
  known.verdicts = verdicts;
  choice.candidate = candidates.front();
  choice.weighed = set_of_all(candidates);
  if (candidates.size() == 1) {
    std::lock_guard<std::mutex> lock(state_->mutex);
    known.calls = 0;
    state_->keep(c.key, choice, known);
    return choice.candidate;
  }
  if (!device.may_measure()) return unmeasured;
  const Measuring measuring(state_->mutex, state_->measuring, choice.key);
  // Two threads that measure at once would disturb each other.
  if (!measuring.mine) return unmeasured;
  double effort = kSecondsPerCase;
  {
    std::lock_guard<std::mutex> lock(state_->mutex);
    effort *= static_cast<double>(kFullCases) / static_cast<double>(std::max(kFullCases, ++state_->measured));
  }
  const PackedCache::Trial trial;  // those that lose need no packed weights
  if (c.prepare) c.prepare();
  const Measurement measured = measure(c, device, candidates, {effort, kMinRounds, kMaxRounds});
  choice.candidate = measured.winner;
  choice.seconds = measured.seconds;
  choice.measurements = choice.agreeing = 1;
  choice.rounds = measured.rounds;
  choice.wins = measured.wins;
  choice.measured_at = device.now();
  known.due = due_call(choice, known, choice.measured_at);
  std::string warning;
  {
    std::lock_guard<std::mutex> lock(state_->mutex);
    state_->keep(c.key, choice, known);
    warning = state_->file.take_warning();
  }
  if (!warning.empty()) warn(warning);
  return choice.candidate;
}

Candidate ChoiceTable::measure_again(const MeasuredCase& c, const MeasuredDevice& device, Choice choice,
                                     const std::vector<Candidate>& candidates) {
  const double start = device.now();
  const auto postpone = [&](double spent) {
    std::lock_guard<std::mutex> lock(state_->mutex);
    if (Known* known = state_->known.get(c.key)) {
      known->spent += spent;
      const uint32_t later = known->calls < kNever / 2 ? std::max<uint32_t>(2 * known->calls, 16) : kNever;
      known->due = choice.settled(start) ? kNever : later;
    }
    return choice.candidate;
  };
  if (choice.settled(start) || too_early(choice, start) || !device.may_measure()) return postpone(0);
  const Measuring measuring(state_->mutex, state_->measuring, choice.key);
  if (!measuring.mine) return postpone(0);
  const PackedCache::Trial trial;
  Measurement measured{};
  try {
    measured = measure(c, device, candidates, {cost_again(choice), kRoundsAgain, kRoundsAgain});
  } catch (...) {
    postpone(device.now() - start);  // Ctrl-C, or nothing can run: the call itself says so
    throw;
  }
  const double end = device.now();
  choice = combined(choice, measured, candidates, end);
  std::string warning;
  {
    std::lock_guard<std::mutex> lock(state_->mutex);
    const Known* before = state_->known.get(c.key);
    Known known = before != nullptr ? *before : Known{nullptr, 1};
    known.spent += end - start;
    known.due = due_call(choice, known, choice.measured_at);
    state_->keep(c.key, choice, known);
    warning = state_->file.take_warning();
  }
  if (!warning.empty()) warn(warning);
  return choice.candidate;
}

Candidate ChoiceTable::next_best(const MeasuredCase& c, CandidateSet failed) {
  const std::vector<Candidate> candidates = without(c.candidates(), failed);
  std::lock_guard<std::mutex> lock(state_->mutex);
  const Known* known = state_->known.get(c.key);
  return known == nullptr ? candidates.front() : fastest(candidates, known->choice->seconds);
}

void ChoiceTable::decline(const MeasuredCase& c, CandidateSet failed) {
  const std::vector<Candidate> candidates = without(c.candidates(), failed);
  std::lock_guard<std::mutex> lock(state_->mutex);
  Known* known = state_->known.get(c.key);
  if (known == nullptr) return;
  auto choice = std::make_shared<Choice>(*known->choice);
  choice->declined |= failed;
  choice->candidate = fastest(candidates, choice->seconds);
  choice->agreeing = 1;
  known->choice = std::move(choice);
  state_->choices.put(known->choice->key, known->choice);
}

bool ChoiceTable::find(const std::string& key, Choice& choice) {
  std::lock_guard<std::mutex> lock(state_->mutex);
  const std::shared_ptr<const Choice>* found = state_->choices.get(key);
  if (found != nullptr) choice = **found;
  return found != nullptr;
}

std::vector<Choice> ChoiceTable::all() {
  std::map<std::string, Choice> by_key;
  std::string warning;
  {
    std::lock_guard<std::mutex> lock(state_->mutex);
    state_->load();
    warning = state_->file.take_warning();
    state_->choices.for_each([&](const auto& choice) { by_key.insert_or_assign(choice->key, *choice); });
    state_->known.for_each([&](const Known& known) { by_key.insert_or_assign(known.choice->key, *known.choice); });
  }
  if (!warning.empty()) warn(warning);
  std::vector<Choice> result;
  for (auto& item : by_key) result.push_back(std::move(item.second));
  return result;
}

void ChoiceTable::clear() {
  std::lock_guard<std::mutex> lock(state_->mutex);
  state_->known.clear();
  state_->choices.clear();
  state_->measured = 0;
  state_->loaded = true;
}

void ChoiceTable::set_file(const std::string& path, const std::string& machine, const std::string& problem) {
  std::lock_guard<std::mutex> lock(state_->mutex);
  state_->file = ChoiceFile(path, machine);
  if (!problem.empty()) state_->file.give_up(problem);
  state_->loaded = false;
}

std::string ChoiceTable::file_problem() {
  std::lock_guard<std::mutex> lock(state_->mutex);
  return state_->file.problem();
}

void ChoiceTable::set_limit(int64_t cases) {
  std::lock_guard<std::mutex> lock(state_->mutex);
  state_->known.set_limit(static_cast<size_t>(cases));
  state_->choices.set_limit(static_cast<size_t>(cases));
}

}  // namespace bap_kernels
