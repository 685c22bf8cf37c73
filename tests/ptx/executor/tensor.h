// Instructions of tensor cores: matrix loads, mma.sync, wgmma.
#pragma once

#include "program.h"

namespace ptx {

// As `build`, for these instructions.
bool build_tensor(const std::string& spelling, const std::vector<Operand>& operands, Instruction& to);
std::vector<std::string> tensor_spellings();

}  // namespace ptx
