// The file of measured choices: what it holds, and how it is read and written. See choice_file.h.
#include "dispatch/choice_file.h"

#include <c10/util/irange.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <sstream>
#include <unordered_map>
#include <utility>

namespace bap_kernels {
namespace {

// A first line that any other content of the file would not have; the version changes with the meaning of a line.
constexpr const char* kHead = "bap_kernels choices v5";
// Measured with fewer candidates, or without a count of measurements: begun anew.
constexpr const char* kOldHeads[] = {"bap_kernels choices v1", "bap_kernels choices v2", "bap_kernels choices v3",
                                     "bap_kernels choices v4"};
// The first versions' file, in the same folder.
constexpr const char* kEarlyName = "choices-v2.tsv";
constexpr const char* kEarlyHead = "bap_kernels choices v4";
// A file is compacted when it is longer than the first, and what does not fit into the second is dropped then, the
// oldest lines first. A line has about 250 bytes.
constexpr size_t kMostBytes = size_t{4} << 20, kBytesAfterwards = size_t{2} << 20;

class File {
 public:
  File(const std::string& path, int flags) {
    // Only regular files are opened: a pipe would wait for its other end, a device may do anything.
    struct stat status{};
    if (::stat(path.c_str(), &status) == 0 && !regular(status)) return;
    // O_NONBLOCK for what has taken the file's place since then.
    fd_ = ::open(path.c_str(), flags | O_CLOEXEC | O_NONBLOCK, 0666);
    if (fd_ < 0) {
      problem_ = std::strerror(errno);
    } else if (::fstat(fd_, &status) == 0) {
      regular(status);
    }
  }
  ~File() {
    if (fd_ >= 0) ::close(fd_);
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  bool good() const { return problem_.empty(); }
  const std::string& problem() const { return problem_; }
  size_t size() const { return size_; }

  // Reads its size anew.
  void measure() {
    struct stat status{};
    if (::fstat(fd_, &status) == 0) regular(status);
  }

  std::string read() { return read(0, size_); }

  std::string read(size_t from, size_t bytes) {
    std::string text(bytes, '\0');
    size_t done = 0;
    while (done < text.size()) {
      const ssize_t n = ::pread(fd_, text.data() + done, text.size() - done, static_cast<off_t>(from + done));
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) problem_ = std::strerror(errno);
      if (n <= 0) break;
      done += static_cast<size_t>(n);
    }
    text.resize(done);
    return text;
  }

  // In one piece, so that lines of several processes do not mix.
  bool write(const std::string& text) {
    size_t done = 0;
    while (done < text.size()) {
      const ssize_t n = ::write(fd_, text.data() + done, text.size() - done);
      if (n < 0 && errno == EINTR) continue;
      if (n <= 0) {
        problem_ = n < 0 ? std::strerror(errno) : "nothing could be written";
        return false;
      }
      done += static_cast<size_t>(n);
    }
    return true;
  }

  // Against a process that compacts; not waited for long, and done without where locks do not work.
  void lock() {
    for (int tries = 0; ::flock(fd_, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK && tries < 50; ++tries) {
      ::usleep(1000);
    }
  }

  bool locked_at_once() { return ::flock(fd_, LOCK_EX | LOCK_NB) == 0; }

  // Whether `path` still names this file.
  bool is(const std::string& path) const {
    struct stat own{}, named{};
    return ::fstat(fd_, &own) == 0 && ::stat(path.c_str(), &named) == 0 && own.st_dev == named.st_dev &&
           own.st_ino == named.st_ino;
  }

 private:
  bool regular(const struct stat& status) {
    size_ = static_cast<size_t>(status.st_size);
    if (S_ISREG(status.st_mode)) return true;
    problem_ = S_ISDIR(status.st_mode)    ? "it is a folder"
               : S_ISFIFO(status.st_mode) ? "it is a pipe"
               : S_ISSOCK(status.st_mode) ? "it is a socket"
                                          : "it is a device";
    return false;
  }

  int fd_ = -1;
  size_t size_ = 0;
  std::string problem_;
};

bool is_old_head(const std::string& line) {
  for (const char* head : kOldHeads) {
    if (line == head) return true;
  }
  return false;
}

std::string first_line(const std::string& text) { return text.substr(0, text.find('\n')); }

bool read_number(const std::string& text, double& number) {
  char* end = nullptr;
  number = std::strtod(text.c_str(), &end);
  return !text.empty() && *end == '\0' && std::isfinite(number) && number >= 0;
}

int candidate_of(const std::string& name) {
  for (const auto r : c10::irange(kCandidateCount)) {
    if (name == candidate_name(static_cast<Candidate>(r))) return r;
  }
  return -1;
}

// A line of the first versions' file: machine, case, chosen one, microseconds of every candidate in Candidate's order.
// It has no counts of rounds, so the choice is not settled.
bool parse_early(const std::string& line, std::string& machine, Choice& choice) {
  std::istringstream fields(line);
  std::string chosen, times;
  for (std::string* field : {&machine, &choice.key, &chosen, &times}) {
    if (!std::getline(fields, *field, '\t')) return false;
  }
  std::istringstream numbers(times);
  std::string text;
  double microseconds = 0;
  for (size_t r = 0; numbers >> text; ++r) {
    if (r >= choice.seconds.size() || !read_number(text, microseconds)) return false;
    choice.seconds[r] = microseconds * 1e-6;
    if (microseconds > 0) choice.weighed |= set_of(static_cast<Candidate>(r));
  }
  const int number = candidate_of(chosen);
  if (number < 0 || choice.key.empty() || !(choice.seconds[number] > 0)) return false;
  choice.candidate = static_cast<Candidate>(number);
  choice.measurements = 1;
  return true;
}

}  // namespace

ChoiceFile::ChoiceFile(std::string path, std::string machine) : path_(std::move(path)), machine_(std::move(machine)) {}

void ChoiceFile::give_up(const std::string& problem) {
  if (!problem_.empty()) return;
  problem_ = problem;
  warning_ = "bap_kernels: measured choices stay in memory, for `" + path_ + "` cannot be used: " + problem +
             ". Hint: BAP_KERNELS_CACHE_DIR names another folder, or none if it is empty.";
}

std::string ChoiceFile::take_warning() { return std::exchange(warning_, ""); }

// machine, case, chosen one, microseconds of the candidates, counts, time, and where there are any the candidates that
// failed: separated by tabs. More fields are ignored.
std::string ChoiceFile::line_of(const Choice& choice) const {
  std::ostringstream line;
  line << machine_ << '\t' << choice.key << '\t' << candidate_name(choice.candidate) << '\t';
  for (const auto r : c10::irange(kCandidateCount)) {
    if (choice.seconds[r] > 0)
      line << candidate_name(static_cast<Candidate>(r)) << '=' << choice.seconds[r] * 1e6 << ' ';
  }
  line << '\t' << choice.measurements << ' ' << choice.agreeing << ' ' << choice.wins << ' ' << choice.rounds << '\t'
       << static_cast<int64_t>(choice.measured_at);
  const char* before = "\t";
  for (const auto r : c10::irange(kCandidateCount)) {
    const auto candidate = static_cast<Candidate>(r);
    if ((choice.weighed & set_of(candidate)) == 0 || choice.seconds[r] > 0) continue;
    line << before << candidate_name(candidate);
    before = " ";
  }
  line << '\n';
  return line.str();
}

bool ChoiceFile::parse(const std::string& line, std::string& machine, Choice& choice) const {
  std::istringstream fields(line);
  std::string chosen, times, counts, when;
  for (std::string* field : {&machine, &choice.key, &chosen, &times, &counts, &when}) {
    if (!std::getline(fields, *field, '\t')) return false;
  }
  const int number = candidate_of(chosen);
  if (number < 0 || choice.key.empty()) return false;
  choice.candidate = static_cast<Candidate>(number);
  std::istringstream pairs(times);
  for (std::string pair; pairs >> pair;) {
    const size_t sign = pair.find('=');
    double microseconds = 0;
    if (sign == std::string::npos || !read_number(pair.substr(sign + 1), microseconds)) return false;
    // Candidates of a later version are left out.
    const int candidate = candidate_of(pair.substr(0, sign));
    if (candidate < 0) continue;
    choice.seconds[candidate] = microseconds * 1e-6;
    choice.weighed |= set_of(static_cast<Candidate>(candidate));
  }
  // Absent in lines of 0.1.0, whose candidates that failed are measured once more.
  std::string failed;
  std::getline(fields, failed, '\t');
  std::istringstream names(failed);
  for (std::string name; names >> name;) {
    const int candidate = candidate_of(name);
    if (candidate >= 0) choice.weighed |= set_of(static_cast<Candidate>(candidate));
  }
  std::istringstream numbers(counts);
  std::string rest;
  return choice.seconds[number] > 0 &&
         static_cast<bool>(numbers >> choice.measurements >> choice.agreeing >> choice.wins >> choice.rounds) &&
         !(numbers >> rest) && choice.agreeing >= 0 && choice.agreeing <= choice.measurements && choice.wins >= 0 &&
         choice.wins <= choice.rounds && read_number(when, choice.measured_at);
}

std::vector<Choice> ChoiceFile::read_early() const {
  std::vector<Choice> choices;
  File file(std::filesystem::path(path_).replace_filename(kEarlyName), O_RDONLY);
  std::istringstream lines(file.good() ? file.read() : "");
  std::string line, machine;
  if (!std::getline(lines, line) || line != kEarlyHead) return choices;
  while (std::getline(lines, line)) {
    Choice choice{};
    if (parse_early(line, machine, choice) && machine == machine_) choices.push_back(std::move(choice));
  }
  return choices;
}

std::vector<Choice> ChoiceFile::read() {
  std::vector<Choice> found;
  if (path_.empty() || !problem_.empty()) return found;
  found = read_early();
  std::error_code ignored;
  if (!std::filesystem::exists(std::filesystem::path(path_), ignored) && !ignored) return found;
  File file(path_, O_RDONLY);
  const std::string text = file.good() ? file.read() : "";
  if (!file.good()) {
    give_up(file.problem());
    return found;
  }
  if (text.empty() || is_old_head(first_line(text))) return found;  // begun anew at the first line that is appended
  if (first_line(text) != kHead) {
    give_up("it is another kind of file");  // not ours: it is left as it is
    return found;
  }
  std::istringstream lines(text);
  int64_t bad = 0;
  for (std::string line; std::getline(lines, line);) {
    if (line.empty() || line == kHead) continue;  // two processes may have begun the file at once
    std::string machine;
    Choice choice{};
    if (!parse(line, machine, choice)) {
      ++bad;
    } else if (machine == machine_) {
      found.push_back(std::move(choice));
    }
  }
  if (bad > 0) {
    warning_ = "bap_kernels: expected `" + path_ + "` to hold measured choices, got " + std::to_string(bad) +
               " unreadable line" + (bad > 1 ? "s" : "") + "; these are ignored and measured again.";
  }
  return found;
}

void ChoiceFile::append(const Choice& choice) {
  if (path_.empty() || !problem_.empty()) return;
  std::error_code failed;
  const auto folder = std::filesystem::path(path_).parent_path();
  if (!folder.empty()) std::filesystem::create_directories(folder, failed);
  if (failed) return give_up(failed.message());
  size_t size = 0;
  for (int tries = 0; tries < 3; ++tries) {
    File file(path_, O_RDWR | O_CREAT | O_APPEND);
    if (!file.good()) return give_up(file.problem());
    file.lock();
    if (!file.is(path_)) continue;  // replaced by a shorter one meanwhile
    file.measure();
    const std::string head = first_line(file.read(0, std::strlen(kHead) + 1));
    const std::string end = file.size() > 0 ? file.read(file.size() - 1, 1) : "\n";
    std::string line = line_of(choice);
    if (file.size() == 0) {
      line = std::string(kHead) + '\n' + line;
    } else if (is_old_head(head)) {
      if (::truncate(path_.c_str(), 0) != 0) return give_up(std::strerror(errno));
      line = std::string(kHead) + '\n' + line;
    } else if (head != kHead) {
      return give_up("it is another kind of file");
    } else if (end != "\n") {
      line = '\n' + line;  // a line that was cut short by a crash must not swallow this one
    }
    if (!file.good() || !file.write(line)) return give_up(file.problem());
    size = file.size() + line.size();
    break;
  }
  if (size > kMostBytes) compact();
}

// Keeps the last line of each case and machine, and of those the ones written last. What others append meanwhile waits
// for the lock; where that is held or does not work, a later line compacts.
void ChoiceFile::compact() {
  File file(path_, O_RDWR);
  if (!file.good() || !file.locked_at_once() || !file.is(path_)) return;
  std::istringstream lines(file.read());
  std::unordered_map<std::string, size_t> last;  // machine and case, to their line
  std::vector<std::string> kept;
  for (std::string line; std::getline(lines, line);) {
    std::string machine;
    Choice choice{};
    if (line == kHead || !parse(line, machine, choice)) continue;
    const auto [place, is_new] = last.try_emplace(machine + '\t' + choice.key, kept.size());
    if (!is_new) kept[std::exchange(place->second, kept.size())].clear();
    kept.push_back(line);
  }
  size_t bytes = 0, first = kept.size();
  while (first > 0 && bytes + kept[first - 1].size() < kBytesAfterwards) bytes += kept[--first].size() + 1;
  std::string text = std::string(kHead) + '\n';
  for (size_t i = first; i < kept.size(); ++i) {
    if (!kept[i].empty()) text += kept[i] + '\n';
  }
  // Beside the file itself, which a link may lead to: a rename does not leave a folder. The name tells processes apart.
  std::error_code failed;
  const std::string target = std::filesystem::canonical(path_, failed).string();
  if (failed) return;
  const std::string beside = target + "." + std::to_string(::getpid()) + ".tmp";
  bool written = false;
  {
    File shorter(beside, O_WRONLY | O_CREAT | O_TRUNC);
    written = shorter.good() && shorter.write(text);
  }
  if (!written || ::rename(beside.c_str(), target.c_str()) != 0) ::unlink(beside.c_str());
}

}  // namespace bap_kernels
