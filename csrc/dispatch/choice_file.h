// The file in which measured choices are kept between processes.
#pragma once

#include <string>
#include <vector>

#include "dispatch/choice.h"

namespace bap_kernels {

// One line for each measurement, the last one of a case holding; lines of other machines and versions of torch stand
// beside ours. Several processes may use it at once: lines are appended whole, and a file that has grown too long is
// replaced by a shorter one under a lock. Whatever is in its place, no call waits for it or fails: a file that cannot
// be used is left alone, and `problem` says why.
class ChoiceFile {
 public:
  // `machine` says what our lines hold for.
  ChoiceFile(std::string path, std::string machine);

  std::vector<Choice> read();
  void append(const Choice& choice);

  const std::string& path() const { return path_; }
  // Why the file is not used any more; empty if it is, or if there is none.
  const std::string& problem() const { return problem_; }
  void give_up(const std::string& problem);
  // Text for one warning since the last call of this; empty if there is nothing to say.
  std::string take_warning();

 private:
  // What the first versions kept in a file of another name: choices that are measured again soon.
  std::vector<Choice> read_early() const;
  std::string line_of(const Choice& choice) const;
  bool parse(const std::string& line, std::string& machine, Choice& choice) const;
  void compact();

  std::string path_, machine_, problem_, warning_;
};

}  // namespace bap_kernels
