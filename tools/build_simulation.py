"""Builds the simulation of the CUDA backend: its kernels' own text, run on the host and on CPU tensors.

    BAP_KERNELS_CUDA_LIBRARY=$(python -m tools.build_simulation) python ...

Needs g++ and torch, neither nvcc nor a GPU. Prints the path of the library, which takes the place of
``bap_kernels._C_cuda``; with it ``use_backend("cuda")`` computes on CPU tensors, slowly. What it checks on the way is
in csrc/backends/cuda/simulate/simulated_block.h.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tools import ninja_build
from tools.build_plan import BuildPlan, Part, TorchFacts, Unit

SOURCES = ("csrc/backends/cuda/simulate/", "csrc/backends/cuda/kernels/launch.cpp")
# The checks are a program of their own.
WITHOUT = "csrc/backends/cuda/simulate/check_"


def simulation_part(sources: list[str], torch: TorchFacts, python_include: str) -> Part:
    """The library of the simulation, as a part of a build."""
    chosen = [source for source in sources if source.startswith(SOURCES) and not source.startswith(WITHOUT)]
    flags = ["-O2", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-DBAP_KERNELS_SIMULATED", "-Icsrc"]
    for directory in (*torch.include_dirs, python_include):
        flags += ["-isystem", directory]
    return Part(
        "_C_cuda_simulated",
        True,
        "for tests",
        units=tuple(Unit(source) for source in chosen),
        flags=tuple(flags),
    )


def build() -> Path:
    """Compiles what changed and returns the library's path."""
    torch, platform = ninja_build.torch_facts(), ninja_build.platform_facts(os.environ)
    part = simulation_part(ninja_build.find_sources(), torch, platform.python_include)
    none = Part("_C_cuda", False, "not asked for")
    plan = BuildPlan(part, none, f"build/simulate-{platform.python_tag}-torch{torch.version}", 2, platform.cxx)
    return ninja_build.build(plan, part, quiet=True)


if __name__ == "__main__":
    print(build())
    sys.exit(0)
