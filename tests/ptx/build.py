"""Builds the executor of PTX, and the CUDA kernels for it, with ninja: once for each state of the sources."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tools import ninja_build
from tools.build_plan import BuildPlan, Part, Unit, version_tuple

EXECUTOR, RUNTIME, KERNELS = "tests/ptx/executor", "tests/ptx/runtime", "csrc/backends/cuda/kernels"
BUILD = "build/ptx"
FLAGS = ("-O2", "-std=c++20", "-fPIC", "-Wall", "-Wextra")
# PTX alone, as text: no assembler runs.
ARCHS = ("80", "90a")


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    """One process at a time builds; the others find it done."""
    folder = ninja_build.ROOT / BUILD
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sources(folder: str, *endings: str) -> list[str]:
    paths = (ninja_build.ROOT / folder).iterdir()
    return sorted(f"{folder}/{path.name}" for path in paths if path.suffix in endings)


def _build(part: Part, build_dir: str = BUILD) -> Path:
    platform = ninja_build.platform_facts(os.environ)
    none = Part("_C_cuda", False, "not asked for")
    with _locked():
        return ninja_build.build(BuildPlan(part, none, build_dir, 2, platform.cxx, platform.nvcc), part, quiet=True)


@functools.cache
def executor_library() -> Path:
    """Compiles what changed of the executor and returns the library's path."""
    units = tuple(Unit(source) for source in _sources(EXECUTOR, ".cpp"))
    return _build(Part("executor", True, "for tests", units=units, flags=FLAGS))


def cuda_obstacle() -> str | None:
    """Why the CUDA kernels cannot be compiled here; None if they can."""
    platform = ninja_build.platform_facts(os.environ)
    if platform.nvcc is None:
        return "nvcc was not found on PATH or under CUDA_HOME"
    if platform.nvcc_version[:1] < version_tuple("12"):
        return "nvcc is older than CUDA 12"
    return None


def _toolkit_includes(nvcc: str | None) -> tuple[str, ...]:
    """Where the toolkit's headers are, as nvcc says, which may be a script of another folder."""
    assert nvcc is not None
    command = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return ("-isystem", re.findall(r'INCLUDES="-I([^"]+)"', log)[0])


@functools.cache
def cuda_library() -> Path:
    """Compiles what changed of ``_C_cuda`` with PTX and the stand-in runtime, and returns the library's path."""
    torch, platform = ninja_build.torch_facts(), ninja_build.platform_facts(os.environ)
    includes = [part for folder in (*torch.include_dirs, platform.python_include) for part in ("-isystem", folder)]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.cxx11_abi)}"
    device = [f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in ARCHS]
    nvcc = ("-O3", "-std=c++20", "-Xcompiler=-fPIC,-Wall", "-Icsrc", "--no-compress", *device)
    host = (*FLAGS, "-Icsrc", abi, *includes, *_toolkit_includes(platform.nvcc))
    units = [Unit(source, "nvcc", nvcc) for source in _sources(KERNELS, ".cu")]
    units += [Unit(f"{KERNELS}/launch.cpp", flags=host)]
    units += [Unit(source, flags=host) for source in _sources(RUNTIME, ".cpp")]
    units += [Unit(source, flags=FLAGS) for source in _sources(EXECUTOR, ".cpp") if not source.endswith("api.cpp")]
    part = Part("_C_cuda_ptx", True, "for tests", units=tuple(units), link_flags=(f"-L{torch.lib_dir}", "-lc10"))
    return _build(part, f"{BUILD}/{platform.python_tag}-torch{torch.version}")
