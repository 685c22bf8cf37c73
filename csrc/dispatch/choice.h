// Choice of the backend by measurement: each case is measured at its first call, and again until the choice is sure.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "dispatch/measured_case.h"

namespace bap_kernels {

using CandidateSet = uint32_t;  // a bit each
constexpr CandidateSet set_of(Candidate candidate) { return CandidateSet{1} << static_cast<int>(candidate); }

using CandidateSeconds = std::array<double, kCandidateCount>;

struct Choice {
  std::string key;             // the case, as text: also the key in the file
  Candidate candidate;         // the chosen one
  CandidateSeconds seconds{};  // of each candidate, the least of all measurements; 0 where not measured
  int measurements = 0;        // how often the case was measured; 0: there was one candidate
  int agreeing = 0;            // the last of them in a row that had the same winner
  int64_t rounds = 0;          // rounds of all measurements in which the chosen one and its closest rival both ran
  int64_t wins = 0;            // those in which the chosen one was no slower
  double measured_at = 0;      // the last time, in seconds since 1970
  CandidateSet weighed = 0;    // those among which it was chosen, also where they raised an error
  CandidateSet declined = 0;   // those that have raised an error after they were chosen, in this process

  // How far the chosen one can be trusted, from 0 to 1: the share of the rounds that it won, with one round more that
  // it won and one that it lost, so that few rounds prove little.
  double confidence() const;
  // Time of its closest rival over its own; infinite without a rival.
  double margin() const;
  // Whether nothing is to be gained by another measurement: two in a row agree and are clear, or there were enough.
  // What was measured a month ago is measured once more.
  bool settled(double now) const;
};

class ChoiceTable {
 public:
  static ChoiceTable& instance();

  // The candidate for a case, measured on its first occurrence. Candidates that raise an error while they are measured
  // are not taken; where all do, the first one's error is raised. A choice that is not settled is measured again in
  // later calls, a minute later at the earliest and within a fiftieth of the time that the case takes. Where there is a
  // candidate that it was not weighed against, it is measured anew, settled or not; on GPUs new verdicts are the time
  // to look.
  Candidate choose(const MeasuredCase& c, const MeasuredDevice& device);

  // The next best of the candidates for a case, where those in `failed` cannot run this call.
  Candidate next_best(const MeasuredCase& c, CandidateSet failed);
  // The choice of a case without candidates that have raised an error, in this process: a later one, with more memory
  // or another driver, tries them again.
  void decline(const MeasuredCase& c, CandidateSet failed);

  // Copies the measured choice of a case; false where there is none.
  bool find(const std::string& key, Choice& choice);

  std::vector<Choice> all();
  void clear();
  // Where choices are kept between processes; empty: memory only, with the reason why if that was not asked for. A file
  // that cannot be used is named in one warning. `machine` names the CPU and the software that our measurements hold
  // for.
  void set_file(const std::string& path, const std::string& machine, const std::string& problem);
  // Why choices are not kept in the file; empty if they are or if there is none.
  std::string file_problem();
  // Most cases that are remembered; what was not used for longest is forgotten first.
  void set_limit(int64_t cases);

 private:
  struct State;
  ChoiceTable();
  Candidate measure_first(const MeasuredCase& c, const MeasuredDevice& device, Choice fresh,
                          const std::vector<Candidate>& candidates, Candidate unmeasured, uint64_t verdicts);
  Candidate measure_again(const MeasuredCase& c, const MeasuredDevice& device, Choice known,
                          const std::vector<Candidate>& candidates);
  State* state_;
};

}  // namespace bap_kernels
