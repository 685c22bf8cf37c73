// PTX as a program: what the parser makes of the text, and what the instructions run.
//
// Every operand is a register. Immediates, addresses of symbols and special registers get registers of their own, which
// are filled when a block starts, so that an instruction looks at nothing but numbers of registers. A register holds 64
// bits for each of the 32 lanes; an instruction's type says how many of them count.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace ptx {

constexpr int kLanes = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;
// Addresses of shared memory begin here, as they do on a GPU: behind what the system keeps.
constexpr uint32_t kSharedBase = 1024;
using Lanes = uint64_t[kLanes];

// What stops a launch: the message names the kernel, the line and the instruction.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class Warp;
struct Instruction;
// Runs an instruction for the lanes of a mask.
using Function = void (*)(Warp&, const Instruction&, uint32_t mask);

// What the scheduler has to know of an instruction besides its function.
enum class Kind : uint8_t {
  kPlain,      // any lanes at any time
  kMove,       // as plain; an undefined or pending source makes an undefined or pending result
  kConverged,  // all lanes of the warp that have not ended run it together
  kProduct,    // as converged; it marks its results itself
  kBranch,
  kReturn,
  kTrap,
  kBarrier,  // bar.sync: blocks
  kTryWait,  // mbarrier.try_wait: blocks until the phase is complete
};

// The parts of a spelling that functions need at run time.
enum class Space : uint8_t { kNone, kParam, kGlobal, kShared };

struct Instruction {
  Function run = nullptr;
  Kind kind = Kind::kPlain;
  Space space = Space::kNone;
  uint8_t bytes = 0;       // of an element of a load, store or copy
  bool is_signed = false;  // whether a narrower element is extended by its sign
  bool ignores = false;    // of a copy: whether its last source says that nothing is read, and is no number of bytes
  int guard = -1;          // register of the predicate
  bool negated = false;    // whether lanes run where the predicate is false
  int target = -1;         // branch: the instruction that follows
  int64_t offset = 0;      // of the first address
  int64_t offset2 = 0;     // of the second address, of copies
  int64_t immediate = 0;   // a count that has to be a constant; of wgmma the columns
  std::vector<int> to;     // registers that are written; -1: none
  std::vector<int> from;   // registers that are read
  int line = 0;            // of the PTX, from 1
  std::string text;
};

struct Parameter {
  std::string name;
  int64_t offset, bytes;
};

struct Kernel {
  std::string name;
  std::vector<Parameter> parameters;
  int64_t parameter_bytes = 0;
  int64_t static_shared_bytes = 0;  // of .shared variables, before those of the launch
  int threads = 0;                  // .reqntid or .maxntid; 0: not said
  std::vector<Instruction> code;
  int registers = 0;
  bool has_wgmma = false, has_bulk = false;
  std::vector<std::pair<int, uint64_t>> constants;    // registers with the same value in every lane
  std::vector<std::pair<int, std::string>> specials;  // %tid.x and others
  std::vector<std::string> register_names;
};

struct Module {
  int arch = 0;
  std::vector<Kernel> kernels;
  const Kernel& kernel(const std::string& name) const;
};

Module parse(const std::string& text);

// An operand as it is written, for the functions that build instructions.
struct Operand {
  enum Form : uint8_t { kRegister, kVector, kAddress, kLabel, kSink } form = kRegister;
  int reg = -1;              // register, or base of an address
  int64_t offset = 0;        // of an address
  bool predicate = false;    // a register of that class
  bool constant = false;     // an immediate
  int64_t value = 0;         // its value
  std::vector<int> members;  // of a vector
  std::string label;
};

// Fills in `run`, `kind`, `to` and `from` for a spelling; false where it is unknown.
bool build(const std::string& spelling, const std::vector<Operand>& operands, Instruction& to);
// Every spelling, or pattern of spellings, that the table knows.
std::vector<std::string> known_spellings();

}  // namespace ptx
