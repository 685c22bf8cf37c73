"""Builds the test programs under ``tests/microkernels`` with the microkernels, with the flags of the package.

``python -m tools.tile_test [--all] [--static] TARGET`` builds ``tile_test.cpp`` for the instruction sets of this
machine, or for all of its architecture.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tools.build_plan import ISA_FLAGS

ROOT = Path(__file__).resolve().parent.parent
_FLAGS = ("-O3", "-std=c++20", "-fPIC", "-Wall", "-fvisibility=hidden")
# Instruction sets as /proc/cpuinfo spells them.
_NEEDS = {
    "avx2": {"avx2", "fma"},
    "emulated": {"avx2", "fma"},
    "avx512": {"avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512dq"},
}
_NEEDS["avx512bf16"] = _NEEDS["avx512"] | {"avx512_bf16"}


# Programs beside tile_test.cpp: each tests one microkernel, which has a source file per architecture.
PROGRAMS = ("pack_row", "gradient_rows")


def isas_here(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """Return the suffixes of the microkernels that this machine can execute."""
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    flags = set(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())
    return [isa for isa, needs in _NEEDS.items() if needs <= flags]


def build(
    target: Path, isas: Sequence[str], static: bool = False, sources: Path = ROOT / "csrc", cxx: str = "g++"
) -> None:
    """Compile the test with the tiles of ``isas`` under ``sources`` and link it to ``target``."""
    macros = tuple(f"-DBAP_KERNELS_HAVE_{isa.upper()}" for isa in isas)
    jobs: list[tuple[Path, tuple[str, ...]]] = [
        (sources / "backends/cpu/cpu_features.cpp", ()),
        (ROOT / "tests/microkernels/tile_test.cpp", macros),
    ]
    for isa in isas:
        tiles = sorted((sources / "backends/cpu/microkernels").glob(f"tile_*{isa}.cpp"))
        jobs += [(path, ISA_FLAGS[isa]) for path in tiles if path.stem.endswith(f"_{isa}")]
    _link(target, jobs, sources, static, cxx)


def build_program(
    name: str, target: Path, isa: str, static: bool = False, sources: Path = ROOT / "csrc", cxx: str = "g++"
) -> None:
    """Compile one of ``PROGRAMS`` with its microkernel of an instruction set, the smallest of an architecture."""
    jobs: list[tuple[Path, tuple[str, ...]]] = [
        (ROOT / f"tests/microkernels/{name}_test.cpp", ()),
        (sources / f"backends/cpu/microkernels/{name}_{isa}.cpp", ISA_FLAGS[isa]),
    ]
    _link(target, jobs, sources, static, cxx)


def _link(target: Path, jobs: Sequence[tuple[Path, tuple[str, ...]]], sources: Path, static: bool, cxx: str) -> None:
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [str(Path(folder) / f"{path.stem}.o") for path, _ in jobs]
        commands = [
            [cxx, *_FLAGS, f"-I{sources}", *flags, "-c", str(path), "-o", output]
            for (path, flags), output in zip(jobs, objects, strict=True)
        ]
        for process in pool.map(subprocess.run, reversed(commands)):
            process.check_returncode()
        subprocess.run([cxx, *(["-static"] if static else []), *objects, "-o", str(target)], check=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tools.tile_test", description=__doc__)
    parser.add_argument("--all", action="store_true", help="every instruction set of the compiler")
    parser.add_argument("--static", action="store_true", help="link without shared libraries")
    parser.add_argument("target", type=Path)
    args = parser.parse_args()
    build(args.target, list(_NEEDS) if args.all else isas_here(), args.static)
