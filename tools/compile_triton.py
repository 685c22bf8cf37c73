"""Compiles the Triton kernels for GPUs that need not be there, and checks their machine code.

    python -m tools.compile_triton [--arch 80 90 100] [--quick] [--json FILE]

Every configuration of the table is compiled as the backend launches it, with the alignment of usual layers. Checked:
copies of 16 bytes to shared memory that run ahead of the products (cp.async, or TMA) in the kernels that read blocks,
planes or all channels; tensor core instructions of the architecture; no spills; registers and shared memory within its
limits. Prints a table with the predicted occupancy, and ends with status 1 where a check fails. Needs Triton, no GPU.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bap_kernels.triton import configs, launch, launch_backward
from bap_kernels.triton.arguments import Mixed
from bap_kernels.triton.configs import Config
from bap_kernels.triton.launch import DualStore, Epilogue
from bap_kernels.triton.launch_spec import Geometry, Launch, Target
from bap_kernels.triton.lists import ChannelList

ARCHS = (80, 90, 100)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# One SM of these architectures: registers, warps and blocks; bytes of shared memory that each block reserves.
REGISTERS, WARPS, BLOCKS, RESERVED = 65536, 64, 32, 1024
SHARED = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
PRODUCTS = {80: ("mma.sync",), 90: ("wgmma.mma_async",), 100: ("tcgen05.mma",)}
# On larger tiles of small words the compiler prefers the instruction of the architecture before.
ANY_PRODUCTS = ("mma.sync", "wgmma.mma_async", "tcgen05.mma")


@dataclass(frozen=True)
class Case:
    """One kernel as one kind of layer launches it.

    Args:
        kernel: a name of ``CASES``.
        arch: compute capability without its point.
        products: "16", "tf32" or "ieee".
        shape: class of the table.
    """

    kernel: str
    arch: int
    products: str
    shape: str

    @property
    def config(self) -> Config:
        """The configuration under test."""
        return configs.TABLE[configs.architecture(self.arch).table, self.products][self.shape]

    @property
    def dtype(self) -> torch.dtype:
        """Element type that stands for the kind of products."""
        return torch.bfloat16 if self.products == "16" else torch.float32


@dataclass(frozen=True)
class Code:
    """What the compiler made of a case; ``wrong`` names the checks that failed."""

    kernel: str
    arch: int
    products: str
    shape: str
    tile: str
    registers: int
    shared_bytes: int
    spill_bytes: int
    copies_16: int
    products_found: str
    blocks_per_sm: int
    occupancy: float
    seconds: float
    wrong: list[str]


def _tensor(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool = False) -> Tensor:
    format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=format)


def _list(kind: int, length: int) -> ChannelList:
    return ChannelList(None if kind == 0 else _tensor((length // kind,), torch.int32), kind, length)


# A layer of ResNet-50: 256 channels of which half are listed, 28 x 28 pixels, batch 32.
BATCH, WIDTH, KEPT, SIDE = 32, 256, 128, 28


def _geometry(kernel: int, stride: int = 1) -> Geometry:
    side = SIDE // stride
    return Geometry(
        *(BATCH, (SIDE, SIDE), (side, side), (kernel, kernel), (stride, stride), (kernel // 2, kernel // 2), (1, 1))
    )


def _mixed() -> Mixed:
    return Mixed(_tensor((8, 5), torch.int64), _tensor((BATCH, 2), torch.int64))


def _copied(case: Case, channels_last: bool) -> Epilogue:
    # What the end of a residual block asks for, which needs the most registers at the end.
    x = _tensor((BATCH, WIDTH, SIDE, SIDE), case.dtype, channels_last)
    copy = DualStore(_tensor((BATCH, KEPT, SIDE, SIDE), case.dtype, channels_last), _tensor((WIDTH,), torch.int32))
    vector = _tensor((WIDTH,), torch.float32)
    return Epilogue(None, vector, vector, x, True, copy)


def _forward(
    case: Case,
    target: Target,
    kind: int,
    kernel: int,
    fused: bool = False,
    mixed: bool = False,
    copied: bool = False,
) -> Launch:
    x = _tensor((BATCH, WIDTH, SIDE, SIDE), case.dtype, True)
    length = WIDTH if kind == 0 else KEPT
    packed = _tensor((WIDTH, kernel**2, length), case.dtype)
    vector = _tensor((WIDTH,), torch.float32)
    epilogue = Epilogue(None, vector, vector, x, True) if fused else Epilogue()
    epilogue = _copied(case, True) if copied else epilogue
    return launch.forward(
        *(x, x, packed, _geometry(kernel), _list(kind, length), _list(0, WIDTH), target),
        epilogue=epilogue,
        mixed=_mixed() if mixed else None,
    )


def _planar(case: Case, target: Target, mixed: bool = False, copied: bool = False) -> Launch:
    x = _tensor((BATCH, WIDTH, SIDE, SIDE), case.dtype)
    packed = _tensor((WIDTH, 1, KEPT), case.dtype)
    return launch.planar(
        *(x, x, packed, _list(1, KEPT), _list(0, WIDTH), target),
        epilogue=_copied(case, False) if copied else Epilogue(),
        mixed=_mixed() if mixed else None,
    )


def _input_gradient(case: Case, target: Target, stride: int, reduce: bool = False) -> Launch:
    geometry = _geometry(3, stride)
    g = _tensor((BATCH, WIDTH, *geometry.out_size), case.dtype, True)
    x = _tensor((BATCH, WIDTH, SIDE, SIDE), case.dtype, True)
    packed = _tensor((KEPT, 9, WIDTH), case.dtype)
    if not reduce:
        return launch_backward.input_gradient(g, packed, geometry, _list(16, KEPT), target, case.config, dx=x)
    partial = _tensor((1024, KEPT), torch.float32)
    return launch_backward.input_gradient(
        g, packed, geometry, _list(1, KEPT), target, case.config, x=x, partial=partial, reduce_off=True
    )


def _weight_gradient(case: Case, target: Target, kind: int) -> Launch:
    geometry = _geometry(3)
    x = _tensor((BATCH, WIDTH, SIDE, SIDE), case.dtype, True)
    length = WIDTH if kind == 0 else KEPT
    partial = launch_backward.weight_gradient_partials(x, geometry, WIDTH, length, target, case.config)
    return launch_backward.weight_gradient(partial, x, x, geometry, _list(kind, length), target, case.config)


# Name -> launch. Those of STAGED must bring their operands in by copies of 16 bytes.
CASES: dict[str, Callable[[Case, Target], Launch]] = {
    "fwd 3x3": partial(_forward, kind=0, kernel=3),
    "fwd 3x3 blocks of 8": partial(_forward, kind=8, kernel=3),
    "fwd 3x3 blocks of 16": partial(_forward, kind=16, kernel=3),
    "fwd 3x3 blocks of 32": partial(_forward, kind=32, kernel=3),
    "fwd 1x1 blocks of 8, fused": partial(_forward, kind=8, kernel=1, fused=True),
    "fwd 3x3 channel by channel": partial(_forward, kind=1, kernel=3),
    "fwd 3x3 blocks of 16, mixed": partial(_forward, kind=16, kernel=3, mixed=True),
    "fwd 3x3 compact, mixed": partial(_forward, kind=0, kernel=3, mixed=True),
    "fwd 1x1 blocks of 8, copied": partial(_forward, kind=8, kernel=1, copied=True),
    "planar": _planar,
    "planar, mixed": partial(_planar, mixed=True),
    "planar, copied": partial(_planar, copied=True),
    "dgrad 3x3": partial(_input_gradient, stride=1),
    "dgrad 3x3 stride 2": partial(_input_gradient, stride=2),
    "dgrad 3x3 reduced": partial(_input_gradient, stride=1, reduce=True),
    "wgrad 3x3": partial(_weight_gradient, kind=0),
    "wgrad 3x3 blocks of 16": partial(_weight_gradient, kind=16),
}
STAGED = tuple(name for name in CASES if name != "fwd 3x3 channel by channel")
# Of these every shape class is compiled, of the others one.
EVERY_SHAPE = (
    *("fwd 3x3", "fwd 3x3 blocks of 8", "fwd 3x3 blocks of 16", "fwd 1x1 blocks of 8, fused"),
    *("fwd 1x1 blocks of 8, copied", "planar", "planar, copied", "dgrad 3x3", "wgrad 3x3"),
)


def table_cases(archs: Iterable[int]) -> list[Case]:
    """All configurations of the table with every kernel that has its own needs."""
    cases = []
    for arch in archs:
        for products in ("16", "tf32", "ieee"):
            for shape in configs.TABLE[configs.architecture(arch).table, products]:
                # Products without tensor cores have nothing of their own but the tile.
                names: tuple[str, ...] = EVERY_SHAPE if products != "ieee" else ("fwd 3x3 blocks of 16", "planar")
                names = tuple(CASES) if shape == "small" and products == "16" else names
                cases += [Case(name, arch, products, shape) for name in names]
    return cases


def quick_cases() -> list[Case]:
    """One case of each kind of kernel, over the architectures in turn."""
    return [
        Case("fwd 3x3 blocks of 16", 80, "16", "large"),
        Case("fwd 3x3 blocks of 8", 90, "16", "large"),
        Case("planar", 90, "16", "large"),
        Case("planar", 80, "tf32", "large"),
        Case("planar, mixed", 90, "16", "small"),
        Case("fwd 1x1 blocks of 8, copied", 90, "16", "large"),
        Case("planar, copied", 90, "16", "huge"),
        Case("dgrad 3x3 stride 2", 90, "16", "small"),
        Case("wgrad 3x3", 100, "16", "small"),
    ]


def describe(case: Case) -> Launch:
    """The launch of a case, on tensors without memory."""
    with configs.overriding(case.config):
        return CASES[case.kernel](case, Target(case.arch, tf32=case.products == "tf32"))


def source_of(step: Launch) -> Any:
    """Triton's source of a launch, specialised as a launch on a GPU specialises it."""
    from triton.compiler import ASTSource

    kernel, constants, attributes = step.spec.kernel, {}, {}

    def type_of(value: Any, path: tuple[int, ...]) -> Any:
        if isinstance(value, tuple):
            types = [type_of(each, (*path, number)) for number, each in enumerate(value)]
            return type(value)(*types)  # named, as the kernel asks for members by name
        if value is None or (isinstance(value, int) and value == 1):
            constants[path] = value
            return "constexpr"
        # Tensors without memory stand for usual ones, whose memory is aligned.
        start = 0 if isinstance(value, Tensor) and value.is_meta else value
        if (start.data_ptr() if isinstance(start, Tensor) else start) % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return POINTERS[value.dtype] if isinstance(value, Tensor) else "i32" if value < 2**31 else "i64"

    signature = {}
    for number, (parameter, value) in enumerate(zip(kernel.params, step.arguments, strict=True)):
        if parameter.is_constexpr:
            signature[parameter.name], constants[(number,)] = "constexpr", value
        else:
            signature[parameter.name] = type_of(value, (number,))
    return ASTSource(kernel, signature, constants, attributes)


def occupancy(arch: int, warps: int, registers: int, shared_bytes: int) -> int:
    """Blocks that one processor holds at once.

    Registers are given out to warps in units of 256, shared memory with 1 KiB more for each block.
    """
    by_registers = REGISTERS // (-(-32 * registers // 256) * 256 * warps)
    by_shared = SHARED[arch] // (shared_bytes + RESERVED)
    return min(by_registers, by_shared, WARPS // warps, BLOCKS)


def resource_usage(cubin: bytes) -> dict[str, int]:
    """Registers and bytes of local memory, from the binary."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


def check(case: Case, ptx: str, usage: dict[str, int], shared_bytes: int) -> list[str]:
    """What is wrong with the code of a case."""
    wrong = []
    # For words of 4 bytes the newer instructions read the axis of the sums side by side; a weight's gradient has its
    # channels side by side, and its operands pass through registers.
    turned = case.products == "tf32" and case.arch >= 90 and case.kernel.startswith("wgrad")
    if case.kernel in STAGED and not turned and not (copies_of_16(ptx) or "cp.async.bulk.tensor" in ptx):
        wrong.append("no copy of 16 bytes")
    if case.products != "ieee":
        wanted = PRODUCTS[case.arch] if case.products == "16" else ANY_PRODUCTS
        if not any(name in ptx for name in wanted):
            wrong.append(f"no {' or '.join(wanted)}")
    if usage["LOCAL"] or usage["STACK"]:
        wrong.append(f"spills {usage['LOCAL'] + usage['STACK']} bytes")
    limit = configs.architecture(case.arch).shared_bytes
    if shared_bytes > limit:
        wrong.append(f"{shared_bytes} bytes of shared memory of {limit}")
    if occupancy(case.arch, case.config.warps, usage["REG"], shared_bytes) < 1:
        wrong.append("no processor holds a block")
    return wrong


def copies_of_16(ptx: str) -> int:
    """Number of asynchronous copies of 16 bytes in the code."""
    return len(re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?, (?:0x10|16),", ptx))


def compile_case(case: Case) -> Code:
    """Compiles one case and checks it."""
    import triton
    from triton.backends.compiler import GPUTarget

    start = time.perf_counter()
    step = describe(case)
    kernel = triton.compile(source_of(step), target=GPUTarget("cuda", case.arch, 32), options=step.spec.options)
    ptx, usage, shared = kernel.asm["ptx"], resource_usage(kernel.asm["cubin"]), int(kernel.metadata.shared)
    blocks = occupancy(case.arch, step.spec.config.warps, usage["REG"], shared)
    config = step.spec.config
    tile = f"{config.BM}x{config.BN}x{config.BK} w{config.warps} s{config.stages}"
    return Code(
        *(case.kernel, case.arch, case.products, case.shape, tile, usage["REG"], shared),
        spill_bytes=usage["LOCAL"] + usage["STACK"],
        copies_16=copies_of_16(ptx),
        products_found=next((name for name in reversed(ANY_PRODUCTS) if name in ptx), "fma"),
        blocks_per_sm=blocks,
        occupancy=blocks * step.spec.config.warps / WARPS,
        seconds=round(time.perf_counter() - start, 1),
        wrong=check(case, ptx, usage, shared),
    )


HEAD = "| kernel | sm | products | shape | tile | registers | shared | copies | instruction | blocks | occupancy |"


def line(c: Code) -> str:
    """A row of the table."""
    cells = [c.kernel, c.arch, c.products, c.shape, c.tile, c.registers, c.shared_bytes, c.copies_16]
    cells += [c.products_found, c.blocks_per_sm, f"{c.occupancy:.0%}"]
    return f"| {' | '.join(map(str, cells))} |" + (f" WRONG: {'; '.join(c.wrong)}" if c.wrong else "")


def main() -> int:
    """Compiles the table; returns 1 where a check fails."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.compile_triton", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHS, choices=ARCHS)
    parser.add_argument("--quick", action="store_true", help="one case of each kind of kernel")
    parser.add_argument("--jobs", type=int, default=None, help="processes; by default one for each core")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    cases = quick_cases() if arguments.quick else table_cases(arguments.arch)
    start = time.perf_counter()
    print(f"{HEAD}\n{'|---' * HEAD.count(' | ')}|---|")
    codes = []
    with ProcessPoolExecutor(arguments.jobs) as pool:
        for code in pool.map(compile_case, cases):
            print(line(code), flush=True)
            codes.append(code)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(code) for code in codes], indent=1) + "\n")
    wrong = [code for code in codes if code.wrong]
    print(f"\n{len(codes)} compiled, {len(wrong)} wrong, {time.perf_counter() - start:.0f} s")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
