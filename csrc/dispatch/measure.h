// One measurement of a case: its candidates in interleaved rounds, within a limit of time.
#pragma once

#include <vector>

#include "dispatch/choice.h"

namespace bap_kernels {

// How much a measurement may cost. A round in which every candidate runs once after its warm-up is always finished,
// unless the warm-ups alone have spent the time and tell.
struct Effort {
  double seconds;  // once min_rounds are done; two and a half times as much before that
  int min_rounds;
  int max_rounds;
};

struct Measurement {
  Candidate winner;
  CandidateSeconds seconds{};  // lower quartile of each candidate's runs; 0 for all others and those that failed
  int rounds = 0;              // in which the winner and its closest rival both ran
  int wins = 0;                // those in which the winner was no slower
};

// The candidate to take by their times: the first unless a later one is faster by more than the noise.
Candidate fastest(const std::vector<Candidate>& candidates, const CandidateSeconds& seconds);

// Runs the candidates, the first of which is preferred. Any error of a candidate leaves it out; the first one's is
// raised where none can run at all. Ctrl-C is heard between runs and raises.
Measurement measure(const MeasuredCase& c, const MeasuredDevice& device, const std::vector<Candidate>& candidates,
                    const Effort& effort);

}  // namespace bap_kernels
