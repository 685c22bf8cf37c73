"""Describes this machine and runs a build plan with ninja.

torch's ``BuildExtension`` compiles every file with the same flags; the microkernels need different ones.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from tools.build_plan import ISA_FLAGS, PRECOMPILED, BuildPlan, Part, PlatformFacts, TorchFacts, Unit, version_tuple

ROOT = Path(__file__).resolve().parent.parent
_RULES = """\
ninja_required_version = 1.5

rule cxx
  command = $compiler -MMD -MF $out.d $flags -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = c++ $in

rule header
  command = $compiler -MMD -MF $out.d $flags -x c++-header $in -o $out
  depfile = $out.d
  deps = gcc
  description = c++ $in

rule nvcc
  command = $compiler -MMD -MF $out.d $flags -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = nvcc $in

rule link
  command = $compiler -shared $in $flags -o $out
  description = link $out
"""


def find_sources() -> list[str]:
    """Return all sources under ``csrc``, relative to the repository and sorted."""
    return sorted(
        path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".cu")
    )


def torch_facts() -> TorchFacts:
    """Describe the installed torch."""
    import torch

    home = Path(torch.__file__).parent
    site = home.parent
    patterns = ("nvidia/cu*/lib/libcudart.so.*", "nvidia/cuda_runtime/lib/libcudart.so.*")
    cudart = sorted(str(path) for pattern in patterns for path in site.glob(pattern))
    openmp = sorted(str(path) for path in (home / "lib").glob("libgomp*.so*"))
    return TorchFacts(
        version=torch.__version__,
        include_dirs=(str(home / "include"), str(home / "include/torch/csrc/api/include")),
        lib_dir=str(home / "lib"),
        cuda=torch.version.cuda,
        cxx11_abi=bool(torch.compiled_with_cxx11_abi()),
        openmp_library=openmp[0] if openmp else None,
        cudart_library=cudart[0] if cudart else None,
    )


def platform_facts(env: Mapping[str, str]) -> PlatformFacts:
    """Describe machine, interpreter and compilers; needs no GPU."""
    cxx = env.get("CXX") or shutil.which("g++") or shutil.which("c++") or "c++"
    nvcc = _find_nvcc(env)
    return PlatformFacts(
        system=platform.system(),
        machine=platform.machine(),
        python_tag=f"cp{sys.version_info.major}{sys.version_info.minor}",
        python_include=sysconfig.get_paths()["include"],
        cxx=cxx,
        cxx_version=(_output([*shlex.split(cxx), "--version"]).splitlines() or [""])[0],
        compiled_isas=tuple(isa for isa, flags in ISA_FLAGS.items() if _accepts(cxx, flags)),
        nvcc=nvcc,
        nvcc_version=_nvcc_version(nvcc),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
    )


def ninja_text(plan: BuildPlan, part: Part) -> str:
    """Return the ninja file of one part; paths are relative to the repository, where ninja runs."""
    # One log of commands and dependencies per part: ninja drops entries that its file does not name.
    lines = [f"builddir = {_escape(plan.build_dir)}/{part.name}.log", _RULES]
    objects = []
    headers = dict.fromkeys(unit.precompiled for unit in part.units if unit.precompiled is not None)
    # GCC uses the first precompiled header on its path if all flags are equal.
    folders = {flags: f"{plan.build_dir}/{part.name}.header{number}" for number, flags in enumerate(headers)}
    for header, folder in folders.items():
        target = f"{folder}/{Path(PRECOMPILED).name}.gch"
        lines += _edge(target, "header", PRECOMPILED, plan.cxx, (*part.flags, *header))
    for unit in part.units:
        folder = plan.normal_dir if unit.reused else plan.build_dir
        target = f"{folder}/{part.name}.objects/{unit.source}.o"
        objects.append(target)
        if unit.reused:
            continue
        inputs, flags = unit.source, (*part.flags, *unit.flags)
        if unit.precompiled is not None:
            folder, name = folders[unit.precompiled], Path(PRECOMPILED).name
            inputs += f" | {_escape(f'{folder}/{name}.gch')}"
            flags = (f"-I{folder}", "-include", name, *flags)
        lines += _edge(target, unit.compiler, inputs, _compiler(plan, unit), flags)
    lines += _edge(library_path(plan, part), "link", " ".join(map(_escape, objects)), plan.cxx, part.link_flags)
    return "\n".join(lines) + "\n"


def library_path(plan: BuildPlan, part: Part) -> str:
    """Return the path of the library of a part, relative to the repository."""
    return f"{plan.build_dir}/{part.name}.so"


def build(plan: BuildPlan, part: Part, verbose: bool = False, quiet: bool = False) -> Path:
    """Build one part and return the path of its library.

    Args:
        plan: The build plan.
        part: Of the plan.
        verbose: Whether ninja prints commands.
        quiet: Whether to keep stdout free of ninja's output.

    Raises:
        subprocess.CalledProcessError: If a compiler or the linker fails.
    """
    script = ROOT / plan.build_dir / f"{part.name}.ninja"
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(ninja_text(plan, part), encoding="utf-8")
    command = [_find_ninja(), "-f", str(script.relative_to(ROOT)), "-j", str(plan.jobs), *(["-v"] if verbose else [])]
    subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr if quiet else None)
    return ROOT / library_path(plan, part)


def _edge(target: str, rule: str, inputs: str, compiler: str, flags: tuple[str, ...]) -> list[str]:
    quoted = " ".join(shlex.quote(flag).replace("$", "$$") for flag in flags)
    return [f"build {_escape(target)}: {rule} {inputs}", f"  compiler = {compiler}", f"  flags = {quoted}"]


def _escape(path: str) -> str:
    return path.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _compiler(plan: BuildPlan, unit: Unit) -> str:
    return (plan.nvcc or "nvcc") if unit.compiler == "nvcc" else plan.cxx


def _find_ninja() -> str:
    try:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        path = shutil.which("ninja")
    if path is None:
        raise FileNotFoundError("setup: expected ninja to be installed. Hint: pip install ninja") from None
    return path


def _find_nvcc(env: Mapping[str, str]) -> str | None:
    for home in (env.get("CUDA_HOME"), env.get("CUDA_PATH")):
        if home and (Path(home) / "bin/nvcc").exists():
            return str(Path(home) / "bin/nvcc")
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def _nvcc_version(nvcc: str | None) -> tuple[int, ...]:
    match = re.search(r"release (\d+\.\d+)", _output([nvcc, "--version"])) if nvcc else None
    return version_tuple(match.group(1)) if match else ()


def _accepts(cxx: str, flags: tuple[str, ...]) -> bool:
    command = [*shlex.split(cxx), *flags, "-x", "c++", "-fsyntax-only", os.devnull]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except OSError:
        return ""
