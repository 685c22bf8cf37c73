"""Compiles the CUDA kernels for GPUs that need not be there, and checks their machine code.

    python -m tools.compile_cuda [--arch 80 90a 100] [--quick] [--json FILE]

Every instance is compiled by nvcc and reported as the assembler saw it. Checked: no spills and no stack; in the kernels
that multiply, copies of 16 bytes to shared memory that run ahead (LDGSTS.128), tensor core instructions of the right
kind (HMMA) and matrix loads (LDSM), and stores of 16 bytes to a halo (STS.128); in the kernels of warpgroups, which
exist for sm_90a alone, products of whole warpgroups (HGMMA) that the assembler did not serialise, registers that change
hands (USETMAXREG), and bulk copies of weights (UBLKCP); registers and shared memory within the limits of the
architecture. Prints a table with the predicted occupancy, and ends with status 1 where a check fails.
Needs nvcc, and cuobjdump or Triton's copy of it; no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from tools import ninja_build

ROOT = Path(__file__).resolve().parent.parent
ARCHS = ("80", "90a", "100")
SOURCES = ("bfloat16", "half", "tf32")
MATH_MODES = SOURCES
HMMA = {"bfloat16": "HMMA.16816.F32.BF16", "half": "HMMA.16816.F32", "tf32": "HMMA.1688.F32.TF32"}
HGMMA = {"bfloat16": "x16.F32.BF16", "half": "x16.F32"}
WARPGROUP_SOURCES = ("bfloat16", "half")
# One SM: registers, warps, blocks; bytes of shared memory, of which each block reserves some.
REGISTERS, WARPS, BLOCKS, RESERVED = 65536, 64, 32, 1024
SHARED = {"80": 164 * 1024, "90a": 228 * 1024, "100": 228 * 1024}
NAMES = {
    "gathered_conv2d": "conv",
    "planar_conv2d": "planar",
    "halo_conv2d": "halo",
    "warpgroup_conv2d": "warpgroup",
    "warpgroup_weight_gradient": "warpgroup weight gradient",
    "weight_gradient": "weight gradient",
    "weight_tiles": "weight tiles",
    "channel_pack": "pack",
    "channel_unpack": "unpack",
    "sum_partials": "sum",
    "split_epilogue": "split epilogue",
}
SMALL_SOURCES = ("channel_pack", "channel_unpack", "sum_partials", "split_epilogue", "weight_tiles")
ELEMENTS = {"13__nv_bfloat16": "bfloat16", "6__half": "half"}


@dataclass(frozen=True)
class Instance:
    """One kernel as its mangled name tells it.

    Args:
        kernel: a value of ``NAMES``.
        mode: one of ``MATH_MODES``, or the element type of a kernel that multiplies nothing; "16 bits": of any type.
        tile: rows, columns, warps along rows and columns, stages, blocks; empty where there is none.
    """

    kernel: str
    mode: str
    tile: tuple[int, ...]

    @property
    def warpgroups(self) -> bool:
        """Whether whole warpgroups multiply, which exists for sm_90a alone."""
        return self.kernel.startswith("warpgroup")

    @property
    def warps(self) -> int:
        """Warps of a block; those of the kernels of warpgroups that copy besides."""
        if not self.tile:
            return 4 if self.kernel == "split epilogue" else 8
        return self.tile[2] * self.tile[3] + 4 * self.warpgroups

    @property
    def shared_bytes(self) -> int:
        """Bytes of dynamic shared memory, as in csrc/backends/cuda/kernels/tile_layout.h."""
        if not self.tile:
            small = {"pack": 64 * 65 * 4, "unpack": 64 * 4 + 64 * 65 * 4, "split epilogue": 5120 + 512 + 256}
            return small.get(self.kernel, 0)
        if self.kernel == "halo":
            # It depends on the layer's kernel and strides; this is the most: kHaloSharedBytes in halo_shape.h.
            return 99 * 1024
        rows, columns, _, _, stages, _ = self.tile
        pipeline = stages * (rows + columns) * 128
        staged = 4 * max(rows * (columns + 8), columns * (rows + 4)) + 32 * rows + 4 * columns
        if self.kernel == "weight gradient":
            return pipeline
        barriers = 16 * stages if self.warpgroups else 0
        return max(pipeline, staged) + barriers


@dataclass(frozen=True)
class Code:
    """What the compiler made of an instance; ``wrong`` names the checks that failed."""

    kernel: str
    arch: str
    mode: str
    tile: str
    layout: str
    registers: int
    shared_bytes: int
    spill_bytes: int
    hmma: int
    hgmma: int
    ldgsts_128: int
    ldsm: int
    blocks_per_sm: int
    occupancy: float
    wrong: list[str]


def instance_of(mangled: str) -> Instance | None:
    """The instance that a mangled name means; None for other functions.

    Examples:
        >>> from tools.compile_cuda import instance_of
        >>> tile = "TileILi64ELi64ELi2ELi2ELi4ELi2EE"
        >>> instance_of(f"_Z22weight_gradient_kernelILNS_8MathModeE2ENS_4{tile}EEvNS_20WeightGradientParamsE")
        Instance(kernel='weight gradient', mode='tf32', tile=(64, 64, 2, 2, 4, 2))
    """
    found = re.search(f"({'|'.join(NAMES)})_kernel", mangled)
    if found is None:
        return None
    mode = re.search(r"MathModeE(\d)", mangled)
    tile = re.search(r"TileI((?:Li\d+E)+)", mangled)
    if mode is None or tile is None:
        any_element = "16 bits" if found.group(1) == "weight_tiles" else "float32"
        element = next((name for part, name in ELEMENTS.items() if part in mangled), any_element)
        return Instance(NAMES[found.group(1)], element, ())
    sizes = tuple(int(size) for size in re.findall(r"Li(\d+)E", tile.group(1)))
    return Instance(NAMES[found.group(1)], MATH_MODES[int(mode.group(1))], sizes)


def usage_of(log: str) -> dict[str, tuple[int, int]]:
    """Registers, and bytes of stack and spills, of each function in the assembler's report.

    Examples:
        >>> from tools.compile_cuda import usage_of
        >>> usage_of('''ptxas info    : Compiling entry function 'f' for 'sm_80'
        ... ptxas info    : Function properties for f
        ...     8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
        ... ptxas info    : Used 40 registers, used 1 barriers, 36 bytes cmem[0]''')
        {'f': (40, 16)}
    """
    usage = {}
    for part in log.split("Compiling entry function '")[1:]:
        name = part.split("'", 1)[0]
        bytes_ = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers = re.search(r"Used (\d+) registers", part)
        if bytes_ is None or registers is None:
            raise ValueError(f"compile_cuda: expected the assembler's report of {name}, got {part[:200]!r}.")
        usage[name] = int(registers.group(1)), sum(map(int, bytes_.groups()))
    return usage


def serialised(log: str, mangled: str) -> bool:
    """Whether the assembler says of a function that its warpgroups wait for each product.

    Examples:
        >>> from tools.compile_cuda import serialised
        >>> log = "Potential Performance Loss: wgmma.mma_async instructions are serialized due to ... in function 'f'"
        >>> serialised(log, "f"), serialised(log, "g")
        (True, False)
    """
    return any("serialized" in line and f"'{mangled}'" in line for line in log.splitlines())


def functions_of(sass: str) -> dict[str, str]:
    """The machine code of each function in cuobjdump's listing."""
    parts = re.split(r"\n\s*Function : (\S+)\n", sass)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def occupancy(arch: str, warps: int, registers: int, shared_bytes: int) -> int:
    """Blocks that one processor holds at once; registers are given out to warps in units of 256."""
    by_registers = REGISTERS // (-(-32 * registers // 256) * 256 * warps)
    by_shared = SHARED[arch] // (shared_bytes + RESERVED)
    return min(by_registers, by_shared, WARPS // warps, BLOCKS)


def examine(instance: Instance, arch: str, registers: int, spill_bytes: int, sass: str) -> Code:
    """The row of one function, with what is wrong about it."""
    hmma, hgmma, ldgsts = sass.count("HMMA."), sass.count("HGMMA."), len(re.findall(r"LDGSTS\.\S*128", sass))
    ldsm = sass.count("LDSM.")
    wrong = [] if spill_bytes == 0 else [f"spills {spill_bytes} bytes"]
    if instance.tile:
        if not ldgsts:
            wrong.append("no LDGSTS.128")
        if instance.warpgroups:
            product = f"HGMMA.64x{instance.tile[1]}{HGMMA[instance.mode]}"
            bulk = ["UBLKCP"] if instance.kernel == "warpgroup" else []
            needed = [product, "USETMAXREG.DEALLOC", "USETMAXREG.TRY_ALLOC", *bulk]
            wrong += [f"no {name}" for name in needed if name not in sass]
        elif HMMA[instance.mode] not in sass:
            wrong.append(f"no {HMMA[instance.mode]}")
        # Words of 4 bytes that lie by depth are loaded one by one, on both sides of the weight's gradient.
        words = instance.kernel == "weight gradient" and instance.mode == "tf32"
        if not ldsm and not words and not instance.warpgroups:
            wrong.append("no LDSM")
        # Chunks of the halo, turned or gathered, are written whole.
        if instance.kernel == "halo" and "STS.128" not in sass:
            wrong.append("no STS.128")
    layout = "any" if instance.kernel == "halo" else "planes" if instance.kernel == "planar" else "nhwc"
    blocks = occupancy(arch, instance.warps, registers, instance.shared_bytes)
    if blocks < (instance.tile[5] if instance.tile else 1):
        wrong.append(f"a processor holds {blocks} blocks")
    return Code(
        *(instance.kernel, arch, instance.mode, "x".join(map(str, instance.tile[:2])) or "-"),
        *(layout, registers, instance.shared_bytes, spill_bytes),
        *(hmma, hgmma, ldgsts, ldsm, blocks),
        occupancy=blocks * instance.warps / WARPS,
        wrong=wrong,
    )


def find_cuobjdump() -> str | None:
    """The cuobjdump on the PATH, or the one of Triton's wheel."""
    found = shutil.which("cuobjdump")
    if found is None:
        try:
            import triton
        except ImportError:
            return None
        bundled = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        found = str(bundled) if bundled.exists() else None
    return found


def machine_code(name: str, arch: str, nvcc: str, cuobjdump: str, folder: Path) -> tuple[str, str]:
    """Compiles one file for one architecture in a folder: the assembler's report, and cuobjdump's listing."""
    cubin = folder / "kernels.cubin"
    command = [nvcc, "-std=c++20", "-O3", "-Icsrc", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-cubin"]
    command += ["-Xptxas", "-v", f"csrc/backends/cuda/kernels/{name}.cu", "-o", str(cubin)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"compile_cuda: nvcc failed for {name} and sm_{arch}:\n{done.stderr}")
    return done.stderr, disassembled(cubin, cuobjdump)


def disassembled(cubin: Path, cuobjdump: str) -> str:
    """What cuobjdump lists of a binary."""
    # It looks for nvdisasm on the PATH.
    paths = os.pathsep.join([str(Path(cuobjdump).parent), os.environ.get("PATH", "")])
    command, environment = [cuobjdump, "-sass", str(cubin)], {**os.environ, "PATH": paths}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def compile_source(name: str, arch: str, nvcc: str, cuobjdump: str) -> list[Code]:
    """Compiles one file for one architecture and examines its kernels."""
    with tempfile.TemporaryDirectory() as folder:
        log, listing = machine_code(name, arch, nvcc, cuobjdump, Path(folder))
    sass, codes = functions_of(listing), []
    for mangled, (registers, spills) in usage_of(log).items():
        instance = instance_of(mangled)
        # Where there are no such products the function is there, and empty.
        if instance is not None and (not instance.warpgroups or arch == "90a"):
            code = examine(instance, arch, registers, spills, sass[mangled])
            if serialised(log, mangled):
                code.wrong.append("products are serialised")
            codes.append(code)
    return codes


HEAD = "| kernel | sm | math mode | tile | layout | registers | shared | spills "
HEAD += "| HMMA | HGMMA | LDGSTS.128 | LDSM | blocks | occupancy |"


def line(c: Code) -> str:
    """A row of the table."""
    cells = [c.kernel, c.arch, c.mode, c.tile, c.layout, c.registers, c.shared_bytes, c.spill_bytes]
    cells += [c.hmma, c.hgmma, c.ldgsts_128, c.ldsm, c.blocks_per_sm, f"{c.occupancy:.0%}"]
    return f"| {' | '.join(map(str, cells))} |" + (f" WRONG: {'; '.join(c.wrong)}" if c.wrong else "")


def main() -> int:
    """Compiles all instances; returns 1 where a check fails."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.compile_cuda", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", nargs="+", default=ARCHS, choices=ARCHS)
    parser.add_argument("--quick", action="store_true", help="the kernels of bfloat16 and TF32 for sm_80 alone")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="compilers run at once")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    nvcc, cuobjdump = ninja_build.platform_facts(os.environ).nvcc, find_cuobjdump()
    if nvcc is None or cuobjdump is None:
        print(f"compile_cuda: expected nvcc and cuobjdump, got {nvcc} and {cuobjdump}. Hint: pip install triton")
        return 1
    files = ["bfloat16", "tf32"] if arguments.quick else list(SOURCES)
    names = [f"gathered_conv2d_{name}" for name in files] + list(SMALL_SOURCES)
    archs = ["80"] if arguments.quick else arguments.arch
    start = time.perf_counter()
    print(f"{HEAD}\n{'|---' * HEAD.count(' | ')}|---|")
    codes: list[Code] = []
    with ThreadPoolExecutor(arguments.jobs) as pool:
        tasks = [pool.submit(compile_source, name, arch, nvcc, cuobjdump) for arch in archs for name in names]
        if "90a" in archs:
            warpgroups = [f"warpgroup_conv2d_{name}" for name in WARPGROUP_SOURCES]
            tasks += [pool.submit(compile_source, name, "90a", nvcc, cuobjdump) for name in warpgroups]
        for task in tasks:
            for code in task.result():
                print(line(code), flush=True)
                codes.append(code)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(code) for code in codes], indent=1) + "\n")
    wrong = [code for code in codes if code.wrong]
    print(f"\n{len(codes)} compiled, {len(wrong)} wrong, {time.perf_counter() - start:.0f} s")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
