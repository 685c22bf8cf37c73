#!/bin/sh
# Checks the system packages that the build needs. Usage: check_system.sh VENV PYTHON
# Prints one line and exits with status 1 at the first missing one.
venv=$1
python=$2

fail() {
    echo "bap_kernels: $1" >&2
    exit 1
}

if [ -x "$venv/bin/python" ]; then
    python=$venv/bin/python
fi
command -v "$python" >/dev/null 2>&1 ||
    fail "Python was not found as '$python'. Hint: apt install python3 python3-venv python3-dev"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "Python 3.10 or newer is needed, '$python' is $("$python" -V 2>&1). Hint: make PYTHON=python3.12 ..."
"$python" -c 'import venv, ensurepip' 2>/dev/null ||
    fail "Python's venv module is incomplete. Hint: apt install python3-venv"
header=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')/Python.h
[ -f "$header" ] ||
    fail "Python's headers were not found ($header). Hint: apt install python3-dev"
cxx=${CXX:-g++}
command -v ${cxx} >/dev/null 2>&1 ||
    fail "the C++ compiler '$cxx' was not found. Hint: apt install g++"
printf '#include <concepts>\n#include <omp.h>\n' | ${cxx} -std=c++20 -fopenmp -x c++ -fsyntax-only - 2>/dev/null ||
    fail "'$cxx' cannot compile C++20 with OpenMP. Hint: apt install g++ (11 or newer)"
