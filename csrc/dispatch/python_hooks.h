// What C++ asks of Python: warnings that `warnings` sees, and whether the user has pressed Ctrl-C.
#pragma once

#include <exception>
#include <functional>
#include <string>

namespace bap_kernels {

struct PythonHooks {
  std::function<void(const std::string& text)> warn;
  std::function<void()> check_interrupt;
  std::function<bool(std::exception_ptr)> is_interrupt;
};

// Each hook takes Python's lock itself. Never destroyed: they hold Python objects, and Python is gone before statics.
void set_python_hooks(PythonHooks hooks);

// Issues a Python warning from any thread, whether or not it holds Python's lock; a filter that makes an error of it
// makes this raise. TORCH_WARN would reach Python only through bindings that install torch's handler.
// Precondition: the caller holds no lock of ours, which another thread may want while it holds Python's.
void warn(const std::string& text);

// Raises what Ctrl-C asks for, where it was pressed. Same precondition.
void check_interrupt();

// Whether an exception ends the program or the cell, such as KeyboardInterrupt: nothing may swallow it. Of any other
// exception that Python raised in this thread, nothing is left pending.
bool is_interrupt(const std::exception_ptr& error);

}  // namespace bap_kernels
