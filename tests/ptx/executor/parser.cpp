// From PTX text to a Module. Comments, debug information and performance hints are left out; everything else that is
// not known is a Fault with its line.
#include <cctype>
#include <cstring>
#include <set>

#include "program.h"

namespace ptx {
namespace {

bool starts(const std::string& text, const char* with) { return text.rfind(with, 0) == 0; }

class Parser {
 public:
  explicit Parser(const std::string& text) : text_(text) { blank_comments(); }

  Module module() {
    while (skip_space(), at_ < text_.size()) {
      if (peek('{') || peek('}') || peek(';')) {
        ++at_;
        continue;
      }
      const std::string word = take_word();
      if (word == ".target") {
        skip_space();
        const std::string target = take_word();
        if (!starts(target, "sm_")) fail("expected a target sm_NN, got " + target);
        module_.arch = std::atoi(target.c_str() + 3);
        skip_line();
      } else if (word == ".version" || word == ".address_size" || word == ".file" || word == ".loc") {
        skip_line();
      } else if (word == ".extern" || word == ".shared") {
        shared_variable(word == ".extern");
      } else if (word == ".section") {
        skip_section();
      } else if (word == ".visible" || word == ".weak") {
        continue;
      } else if (word == ".entry") {
        entry();
      } else {
        fail("unknown directive " + word);
      }
    }
    for (Kernel& kernel : module_.kernels) kernel.static_shared_bytes = shared_bytes_;
    return std::move(module_);
  }

 private:
  [[noreturn]] void fail(const std::string& why) const { throw Fault("line " + std::to_string(line()) + ": " + why); }

  int line() const {
    int count = line_;
    for (size_t i = line_at_; i < std::min(at_, text_.size()); ++i) count += text_[i] == '\n';
    line_at_ = std::max(line_at_, std::min(at_, text_.size()));
    return line_ = count;
  }

  // Keeps the lines where they are.
  void blank_comments() {
    for (size_t i = 0; i + 1 < text_.size(); ++i) {
      if (text_[i] == '/' && text_[i + 1] == '/') {
        while (i < text_.size() && text_[i] != '\n') text_[i++] = ' ';
      } else if (text_[i] == '/' && text_[i + 1] == '*') {
        size_t end = text_.find("*/", i);
        end = end == std::string::npos ? text_.size() : end + 2;
        for (; i < end; ++i) {
          if (text_[i] != '\n') text_[i] = ' ';
        }
      }
    }
  }

  bool peek(char c) const { return at_ < text_.size() && text_[at_] == c; }
  void skip_space() {
    while (at_ < text_.size() && std::isspace(static_cast<unsigned char>(text_[at_]))) ++at_;
  }
  void skip_line() {
    while (at_ < text_.size() && text_[at_] != '\n') ++at_;
  }
  static bool in_word(char c) { return std::isalnum(static_cast<unsigned char>(c)) || std::strchr("_.$%:", c); }
  std::string take_word() {
    const size_t from = at_;
    while (at_ < text_.size() && in_word(text_[at_])) ++at_;
    if (at_ == from) fail(std::string("unexpected character '") + text_[at_] + "'");
    return text_.substr(from, at_ - from);
  }
  std::string until(char end) {
    const size_t from = at_, found = text_.find(end, at_);
    if (found == std::string::npos) fail(std::string("expected '") + end + "'");
    at_ = found + 1;
    return text_.substr(from, found - from);
  }
  void skip_section() {
    until('{');
    int depth = 1;
    while (depth > 0 && at_ < text_.size()) depth += text_[at_] == '{' ? 1 : text_[at_] == '}' ? -1 : 0, ++at_;
  }

  static std::vector<std::string> words(const std::string& text) {
    std::vector<std::string> found;
    std::string word;
    for (const char c : text + " ") {
      if (std::isspace(static_cast<unsigned char>(c)) || c == ',') {
        if (!word.empty()) found.push_back(std::move(word));
        word.clear();
      } else {
        word += c;
      }
    }
    return found;
  }

  // .extern .shared .align 16 .b8 name[]; or .shared .align 4 .b8 name[64];
  void shared_variable(bool external) {
    std::string name;
    int64_t align = 1, bytes = 0;
    const std::vector<std::string> parts = words(until(';'));
    for (size_t i = 0; i < parts.size(); ++i) {
      if (parts[i] == ".align") {
        align = std::atoi(parts[++i].c_str());
      } else if (parts[i][0] != '.') {
        const size_t bracket = parts[i].find('[');
        name = parts[i].substr(0, bracket);
        bytes = bracket == std::string::npos ? 0 : std::atoi(parts[i].c_str() + bracket + 1);
      }
    }
    shared_bytes_ = (shared_bytes_ + align - 1) / align * align;
    symbols_[name] = kSharedBase + (external ? 0 : shared_bytes_);
    if (external && shared_bytes_ > 0) fail("a kernel's own and the launch's shared memory in one module");
    shared_bytes_ += bytes;
  }

  void entry() {
    skip_space();
    module_.kernels.emplace_back();
    kernel_ = &module_.kernels.back();
    kernel_->name = take_word();
    registers_.assign(1, {});
    constants_.clear();
    specials_.clear();
    labels_.clear();
    predicates_.clear();
    jumps_.clear();
    parameters_.clear();
    skip_space();
    if (peek('(')) {
      ++at_;
      parameters(until(')'));
    }
    while (skip_space(), !peek('{')) {
      const std::string word = take_word();
      if (word == ".reqntid" || word == ".maxntid") {
        kernel_->threads = 1;
        skip_space();
        size_t end = at_;
        while (end < text_.size() &&
               (std::isdigit(static_cast<unsigned char>(text_[end])) || text_[end] == ',' || text_[end] == ' '))
          ++end;
        for (const std::string& size : words(text_.substr(at_, end - at_))) kernel_->threads *= std::atoi(size.c_str());
        at_ = end;
      } else if (word == ".minnctapersm" || word == ".maxnreg" || word == ".maxclusterrank") {
        skip_space();
        take_word();
      } else {
        fail("unknown directive of an entry " + word);
      }
    }
    body();
    for (const auto& [number, label] : jumps_) {
      const auto found = labels_.find(label);
      if (found == labels_.end()) fail("no label " + label);
      kernel_->code[number].target = found->second;
    }
    kernel_->registers = static_cast<int>(kernel_->register_names.size());
  }

  void parameters(const std::string& list) {
    std::string one;
    for (const char c : list + ",") {
      if (c != ',') {
        one += c;
        continue;
      }
      int64_t align = 0, bytes = 0, length = 1;
      std::string name;
      const std::vector<std::string> parts = words(one);
      one.clear();
      if (parts.empty()) continue;
      for (size_t i = 0; i < parts.size(); ++i) {
        if (parts[i] == ".align") {
          // Behind .ptr it speaks of what is pointed at.
          const int64_t given = std::atoi(parts[++i].c_str());
          if (bytes == 0) align = given;
        } else if (parts[i].size() > 2 && parts[i][0] == '.' && std::isdigit(static_cast<unsigned char>(parts[i][2]))) {
          bytes = std::atoi(parts[i].c_str() + 2) / 8;
        } else if (parts[i][0] != '.') {
          const size_t bracket = parts[i].find('[');
          name = parts[i].substr(0, bracket);
          if (bracket != std::string::npos) length = std::atoi(parts[i].c_str() + bracket + 1);
        }
      }
      align = std::max(align, bytes);
      int64_t& end = kernel_->parameter_bytes;
      end = (end + align - 1) / align * align;
      kernel_->parameters.push_back({name, end, bytes * length});
      parameters_[name] = end;
      end += bytes * length;
    }
  }

  void body() {
    int depth = 0;
    do {
      skip_space();
      if (at_ >= text_.size()) fail("expected the end of an entry");
      if (peek('{')) {
        ++at_, ++depth;
        registers_.emplace_back();
        continue;
      }
      if (peek('}')) {
        ++at_, --depth;
        registers_.pop_back();
        continue;
      }
      statement();
    } while (depth > 0);
  }

  void statement() {
    const int where = line();
    if (peek('.')) {
      const std::string word = take_word();
      if (word == ".reg") {
        declare(until(';'));
      } else if (word == ".loc") {
        skip_line();
      } else if (word == ".pragma") {
        until(';');
      } else if (word == ".shared") {
        shared_variable(false);
      } else {
        fail("unknown directive " + word);
      }
      return;
    }
    if (peek(';')) {
      ++at_;
      return;
    }
    Instruction made;
    made.line = where;
    if (peek('@')) {
      ++at_;
      if (peek('!')) ++at_, made.negated = true;
      made.guard = operand(take_word()).reg;
      skip_space();
    }
    const size_t from = at_;
    std::string word = take_word();
    if (word.back() == ':') {
      labels_[word.substr(0, word.size() - 1)] = static_cast<int>(kernel_->code.size());
      return;
    }
    const std::string rest = until(';');
    made.text = text_.substr(from, at_ - from - 1);
    for (char& c : made.text) c = c == '\n' || c == '\t' ? ' ' : c;
    if (made.text.size() > 160) made.text = made.text.substr(0, 160) + " ...";
    const std::vector<Operand> given = operands(rest);
    if (!build(word, given, made)) throw Fault("line " + std::to_string(where) + ": unknown instruction " + made.text);
    if (made.kind == Kind::kBranch) jumps_.emplace_back(kernel_->code.size(), given.at(0).label);
    if (starts(word, "wgmma.mma")) kernel_->has_wgmma = true;
    if (starts(word, "cp.async.bulk")) kernel_->has_bulk = true;
    kernel_->code.push_back(std::move(made));
  }

  // .reg .b32 %r<10>; or .reg .pred p, q;
  void declare(const std::string& text) {
    const std::vector<std::string> parts = words(text);
    const int first = static_cast<int>(kernel_->register_names.size());
    for (size_t i = 1; i < parts.size(); ++i) {
      const size_t range = parts[i].find('<');
      if (range == std::string::npos) {
        registers_.back()[parts[i]] = new_register(parts[i]);
        continue;
      }
      const std::string stem = parts[i].substr(0, range);
      const int count = std::atoi(parts[i].c_str() + range + 1);
      for (int n = 0; n < count; ++n) {
        registers_.back()[stem + std::to_string(n)] = new_register(stem + std::to_string(n));
      }
    }
    if (parts[0] != ".pred") return;
    for (int reg = first; reg < static_cast<int>(kernel_->register_names.size()); ++reg) predicates_.insert(reg);
  }

  int new_register(const std::string& name) {
    kernel_->register_names.push_back(name);
    return static_cast<int>(kernel_->register_names.size()) - 1;
  }

  Operand constant(uint64_t value) {
    const auto [found, added] = constants_.emplace(value, 0);
    if (added) {
      found->second = new_register(std::to_string(static_cast<int64_t>(value)));
      kernel_->constants.emplace_back(found->second, value);
    }
    Operand made;
    made.reg = found->second;
    made.constant = true;
    made.value = static_cast<int64_t>(value);
    return made;
  }

  Operand operand(const std::string& word) {
    if (word == "_") {
      Operand sink;
      sink.form = Operand::kSink;
      return sink;
    }
    for (size_t scope = registers_.size(); scope-- > 0;) {
      const auto found = registers_[scope].find(word);
      if (found == registers_[scope].end()) continue;
      Operand made;
      made.reg = found->second;
      made.predicate = predicates_.count(made.reg) > 0;
      return made;
    }
    if (const auto found = parameters_.find(word); found != parameters_.end()) return constant(found->second);
    if (const auto found = symbols_.find(word); found != symbols_.end()) return constant(found->second);
    if (word == "WARP_SZ") return constant(kLanes);
    if (starts(word, "0f") || starts(word, "0F") || starts(word, "0d") || starts(word, "0D")) {
      return constant(std::strtoull(word.c_str() + 2, nullptr, 16));
    }
    if (std::isdigit(static_cast<unsigned char>(word[0]))) return constant(std::strtoull(word.c_str(), nullptr, 0));
    if (word[0] == '-') return constant(0 - std::strtoull(word.c_str() + 1, nullptr, 0));
    if (word[0] == '%') {
      const auto [found, added] = specials_.emplace(word, 0);
      if (added) {
        found->second = new_register(word);
        kernel_->specials.emplace_back(found->second, word);
      }
      Operand made;
      made.reg = found->second;
      return made;
    }
    Operand made;
    made.form = Operand::kLabel;
    made.label = word;
    return made;
  }

  std::vector<Operand> operands(const std::string& text) {
    std::vector<Operand> found;
    size_t i = 0;
    const auto space = [&] {
      while (i < text.size() && (std::isspace(static_cast<unsigned char>(text[i])) || text[i] == ',')) ++i;
    };
    const auto word = [&] {
      const size_t from = i;
      if (i < text.size() && text[i] == '-') ++i;
      while (i < text.size() && in_word(text[i])) ++i;
      if (from == i) fail("cannot read the operands" + text);
      return text.substr(from, i - from);
    };
    while (space(), i < text.size()) {
      if (text[i] == '{') {
        ++i;
        Operand vector;
        vector.form = Operand::kVector;
        while (space(), i < text.size() && text[i] != '}') {
          const Operand member = operand(word());
          vector.members.push_back(member.form == Operand::kSink ? -1 : member.reg);
        }
        ++i;
        found.push_back(std::move(vector));
      } else if (text[i] == '[') {
        ++i, space();
        Operand address = operand(word());
        if (address.form == Operand::kLabel) fail("no symbol " + address.label);
        address.form = Operand::kAddress;
        while (space(), i < text.size() && text[i] != ']') {
          const bool minus = text[i] == '-';
          if (text[i] == '+') ++i, space();
          const int64_t offset = operand(word()).value;
          address.offset += offset;
          static_cast<void>(minus);
        }
        ++i;
        found.push_back(std::move(address));
      } else {
        found.push_back(operand(word()));
      }
    }
    return found;
  }

  std::string text_;
  size_t at_ = 0;
  mutable int line_ = 1;
  mutable size_t line_at_ = 0;
  Module module_;
  Kernel* kernel_ = nullptr;
  int64_t shared_bytes_ = 0;
  std::vector<std::unordered_map<std::string, int>> registers_;  // by scope
  std::unordered_map<uint64_t, int> constants_;
  std::unordered_map<std::string, int> specials_;
  std::unordered_map<std::string, int> labels_;
  std::set<int> predicates_;  // registers of that class
  std::unordered_map<std::string, int64_t> parameters_, symbols_;
  std::vector<std::pair<size_t, std::string>> jumps_;
};

}  // namespace

const Kernel& Module::kernel(const std::string& name) const {
  for (const Kernel& each : kernels) {
    if (each.name == name) return each;
  }
  throw Fault("no kernel " + name);
}

Module parse(const std::string& text) { return Parser(text).module(); }

}  // namespace ptx
