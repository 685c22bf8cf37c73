"""Calculates what the machine code of the GPU kernels says about their speed, without a GPU.

    python -m tools.kernel_figures [--gpu H200] [--batch 64] [--out FILE]

Two tables. The first has a row for each kernel in float16: instructions of the main loop for each step (128 bytes of
depth), integer divisions there and before it, registers, shared memory, spills, blocks that an SM holds, bytes copied
and tensor core cycles for each step. The second has the least time of layers of ResNet-50 that follows from it. Nothing
in them is measured: latencies, caches, bank conflicts and the queues of memory are left out.

    cycles of a block = (before + steps * loop + behind + rounds * store) * warps / 4        issued instructions
                        max with: tensor cores, shared memory, L2, by step
    time of a layer   = max(waves * cycles / clock, bytes from memory / bandwidth)
                        and where sums are cut into parts, the least time of the launch that adds them

A path through a loop is the shortest one on which its copies, products or stores are made. Needs nvcc, and cuobjdump or
Triton's copy of it; with Triton, its main forward has a row, too.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benches.roofline import GPUS, Gpu
from tools import compile_cuda, ninja_build
from tools.compile_cuda import Instance
from tools.machine_code import Code, Instruction, Loop, divisions

SOURCES = ("gathered_conv2d_half", "channel_pack", "channel_unpack")
WARPGROUP_SOURCE = "warpgroup_conv2d_half"
# SMs, cycles per second and multiply-adds of 16-bit elements per cycle and SM: data sheets. HOPPER_MMA: the share of
# the peak that mma.sync reached in "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture" (arXiv 2402.13499).
SMS = {"H200": 132, "H100": 132, "A100": 108}
CLOCK = {"H200": 1.83e9, "H100": 1.83e9, "A100": 1.41e9}
MULTIPLY_ADDS = {"H200": 2048, "H100": 2048, "A100": 1024}
ARCH = {"H200": "90a", "H100": "90a", "A100": "80"}
HOPPER_MMA = 0.63
SCHEDULERS, SHARED_BYTES_PER_CYCLE, ELEMENT, STEP = 4, 128, 2, 64
L2_BYTES_PER_CYCLE = 64  # that one SM can read from L2


def is_product(one: Instruction) -> bool:
    """Whether it multiplies on tensor cores."""
    return one.name.startswith(("HMMA", "HGMMA"))


def is_copy(one: Instruction) -> bool:
    """Whether it copies to shared memory asynchronously."""
    return one.name.startswith(("LDGSTS", "UBLKCP"))


def is_wide_store(one: Instruction) -> bool:
    """Whether it stores 16 bytes."""
    return one.name.startswith("STG") and "128" in one.name


@dataclass(frozen=True)
class Figures:
    """What the machine code of one kernel says.

    Args:
        instance: the kernel.
        gradient: whether it is the instance of the input's gradient.
        loop: instructions for a step of the warps that multiply, or for a round of a kernel that multiplies nothing.
        copying: instructions for a step of warps that only copy; 0: there are none.
        static: all instructions of these loops, whatever their path.
        loop_divisions: integer divisions in them.
        before: instructions on the longest way to the loop.
        before_divisions: integer divisions before it.
        behind: instructions on the shortest way from the loop to the one that stores.
        store: instructions of a round of that.
        matrix_loads: of a step, LDSM.
        registers: of a thread.
        shared_bytes: of a block.
        spills: bytes.
        blocks: that an SM holds.
        warpgroups: whether whole warpgroups multiply.
    """

    instance: Instance
    gradient: bool
    loop: float
    copying: float
    static: int
    loop_divisions: int
    before: int
    before_divisions: int
    behind: int
    store: int
    matrix_loads: int
    registers: int
    shared_bytes: int
    spills: int
    blocks: int
    warpgroups: bool = False

    @property
    def warps(self) -> int:
        """Warps that multiply."""
        return self.instance.tile[2] * self.instance.tile[3] if self.instance.tile else self.instance.warps

    @property
    def step_bytes(self) -> int:
        """Bytes of both operands that a step copies."""
        return sum(self.instance.tile[:2]) * 128 if self.instance.tile else 0

    @property
    def step_instructions(self) -> float:
        """Instructions that all warps of a block issue for a step."""
        return self.warps * self.loop + 4 * self.copying

    def tensor_cycles(self, gpu: str) -> float:
        """Cycles of the tensor cores for a step."""
        share = HOPPER_MMA if ARCH[gpu] == "90a" and not self.warpgroups else 1.0
        return math.prod(self.instance.tile[:2]) * STEP / (MULTIPLY_ADDS[gpu] * share)

    def shared_cycles(self) -> float:
        """Cycles of shared memory for a step: copies written, operands read."""
        rows, columns = self.instance.tile[:2]
        by_products, by_loads = (rows + rows // 64 * columns) * 128, self.matrix_loads * 512 * self.warps
        read = by_products if self.warpgroups else by_loads
        return (self.step_bytes + read) / SHARED_BYTES_PER_CYCLE

    def limits(self, gpu: str, sms: int = 0) -> dict[str, float]:
        """Cycles that a step of one block takes at least, by what limits it; ``sms`` of them, 0: all, read from L2."""
        share = GPUS[gpu].l2_bytes_per_s / CLOCK[gpu] / (sms or SMS[gpu])
        return {
            "issue": self.step_instructions / SCHEDULERS,
            "tensor cores": self.tensor_cycles(gpu),
            "shared memory": self.shared_cycles(),
            "L2": self.step_bytes / min(share, L2_BYTES_PER_CYCLE),
        }


def figures_of(instance: Instance, gradient: bool, sass: str, registers: int, spills: int, arch: str) -> Figures:
    """Reads one kernel's listing.

    Raises:
        ValueError: if it has no loop of the kind that such a kernel has.
    """
    code = Code(sass)
    wanted: Callable[[Instruction], bool] = is_product if instance.tile else is_wide_store
    main = code.innermost(wanted)
    if main is None:
        raise ValueError(f"kernel_figures: expected a loop in {instance}, got none.")
    copies = code.innermost(is_copy) if instance.warpgroups else None
    store = code.innermost(is_wide_store) if instance.tile else None
    steps = 1.0
    if instance.tile and not instance.warpgroups:
        rows, columns, warps_m, warps_n = instance.tile[:4]
        per_step = rows // warps_m // 16 * (columns // warps_n // 8) * (STEP // 16)
        steps = main.count("HMMA") / per_step

    def through(loop: Loop, good: Callable[[Instruction], bool], enough: int = 1 << 20) -> int:
        return code.path(loop.head, loop.head, loop.blocks, good, enough)

    loops = [main] + ([copies] if copies else [])
    before = code.before(copies or main)
    blocks = compile_cuda.occupancy(arch, instance.warps, registers, instance.shared_bytes)
    # With halos, channels are brought in by loops of their own.
    good = is_product if instance.kernel == "halo" else lambda one: is_copy(one) or wanted(one)
    return Figures(
        instance,
        gradient,
        through(main, good, 1 if not instance.tile else 1 << 20) / steps,
        through(copies, is_copy) / steps if copies else 0,
        sum(len(loop.instructions) for loop in loops),
        sum(divisions(loop.instructions) for loop in loops),
        code.path(0, (copies or main).head, longest=True),
        divisions(before),
        code.path(main.head, store.head) if store else 0,
        through(store, is_wide_store, 1) if store else 0,
        main.count("LDSM"),
        registers,
        instance.shared_bytes,
        spills,
        blocks,
        main.count("HGMMA") > 0,
    )


def compiled(name: str, arch: str, nvcc: str, cuobjdump: str) -> list[Figures]:
    """Compiles one file and reads its kernels."""
    with tempfile.TemporaryDirectory() as folder:
        log, sass = compile_cuda.machine_code(name, arch, nvcc, cuobjdump, Path(folder))
    functions, found = compile_cuda.functions_of(sass), []
    for mangled, (registers, spills) in compile_cuda.usage_of(log).items():
        instance = compile_cuda.instance_of(mangled)
        if instance is not None and instance.mode == "half":
            gradient = is_gradient(mangled)
            found.append(figures_of(instance, gradient, functions[mangled], registers, spills, arch))
    return found


def triton_forward(arch: str, cuobjdump: str) -> list[Figures]:
    """Triton's forward with the large tile, 3x3 and blocks of 16 channels; none where Triton is not there."""
    try:
        import triton
    except ImportError:
        return []
    from triton.backends.compiler import GPUTarget

    from tools import compile_triton

    case = compile_triton.Case("fwd 3x3 blocks of 16", int(arch.rstrip("a")), "16", "large")
    step, config = compile_triton.describe(case), case.config
    target = GPUTarget("cuda", case.arch, 32)
    made = triton.compile(compile_triton.source_of(step), target=target, options=step.spec.options)
    usage = compile_triton.resource_usage(made.asm["cubin"])
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(made.asm["cubin"])
        [sass] = compile_cuda.functions_of(compile_cuda.disassembled(cubin, cuobjdump)).values()
    code = Code(sass)
    main, store = code.innermost(is_product), code.innermost(is_wide_store)
    if main is None:
        raise ValueError("kernel_figures: expected a loop in Triton's forward, got none.")

    def good(one: Instruction) -> bool:
        return is_copy(one) or is_product(one)

    before, steps = code.before(main), config.BK / STEP
    return [
        Figures(
            Instance("Triton forward", "half", (config.BM, config.BN, config.warps, 1, config.stages, 1)),
            False,
            code.path(main.head, main.head, main.blocks, good) / steps,
            0,
            len(main.instructions),
            divisions(main.instructions),
            code.path(0, main.head, longest=True),
            divisions(before),
            0,
            code.path(store.head, store.head, store.blocks, is_wide_store, 1) if store else 0,
            main.count("LDSM"),
            usage["REG"],
            int(made.metadata.shared),
            usage["LOCAL"] + usage["STACK"],
            compile_triton.occupancy(case.arch, config.warps, usage["REG"], int(made.metadata.shared)),
            main.count("HGMMA") > 0,
        )
    ]


def is_gradient(mangled: str) -> bool:
    """Whether a mangled name is that of the input's gradient.

    Examples:
        >>> from tools.kernel_figures import is_gradient
        >>> is_gradient("gathered_conv2d_kernelILi2EEELb1EEEv"), is_gradient("gathered_conv2d_kernelILi2EEELb0EEEv")
        (True, False)
    """
    return "Lb1E" in mangled


@dataclass(frozen=True)
class Layer:
    """A convolution of ResNet-50: channels, side of the result, side of the kernel."""

    C_in: int
    C_out: int
    side: int
    kernel: int

    def steps(self) -> int:
        """Steps of the sum."""
        return math.ceil(self.C_in / STEP) * self.kernel**2


LAYERS = (
    *(Layer(64, 256, 56, 1), Layer(256, 64, 56, 1), Layer(64, 64, 56, 3), Layer(128, 128, 28, 3)),
    *(Layer(1024, 256, 14, 1), Layer(256, 256, 14, 3), Layer(512, 2048, 7, 1), Layer(512, 512, 7, 3)),
)


def parts_of(tiles: int, steps: int, gpu: str) -> int:
    """``choose_parts`` in instances.h."""
    return 1 if 2 * tiles >= SMS[gpu] or steps < 16 else min(SMS[gpu] // tiles, steps // 4)


def choice(layer: Layer, batch: int, gpu: str) -> tuple[str, tuple[int, int], int]:
    """Kernel, tile and parts of a forward in NHWC: ``choose_gemm`` in plan.cpp and what it calls, in instances.h."""
    kernel, tile = _kernel(layer, batch, gpu)
    tiles = math.ceil(batch * layer.side**2 / tile[0]) * math.ceil(layer.C_out / tile[1])
    return kernel, tile, parts_of(tiles, layer.steps(), gpu)


def _kernel(layer: Layer, batch: int, gpu: str) -> tuple[str, tuple[int, int]]:
    rows, columns, sms = batch * layer.side**2, layer.C_out, SMS[gpu]

    def tiles(m: int, n: int) -> int:
        return math.ceil(rows / m) * math.ceil(columns / n)

    if columns <= 32:
        return "conv", (128, 32)
    warpgroups = ARCH[gpu] == "90a"
    large = tiles(128, 128)
    fills = 2 * large * parts_of(large, layer.steps(), gpu) > sms if warpgroups else large >= sms
    if 2 * columns <= 128 or 2 * rows <= 128 or not fills:
        return "conv", (64, 64)
    if not warpgroups:
        return "conv", (128, 128)
    even = math.ceil(columns / 256) * 2 == math.ceil(columns / 128)
    return "warpgroup", (128, 256 if even and tiles(128, 256) >= sms else 128)


def layer_time(layer: Layer, batch: int, gpu: str, f: Figures, parts: int = 1) -> tuple[float, str]:
    """Least seconds of a layer by a kernel's figures, and what limits it.

    Args:
        parts: that sums are cut into. Adding them costs at least their bytes from L2.
    """
    data: Gpu = GPUS[gpu]
    rows, columns = f.instance.tile[:2]
    pixels = batch * layer.side**2
    tiles = parts * math.ceil(pixels / rows) * math.ceil(layer.C_out / columns)
    rounds = rows * columns * ELEMENT // 16 // (32 * f.warps)
    around = (f.before + f.behind + rounds * f.store) * f.warps / SCHEDULERS
    limits = f.limits(gpu, min(tiles, SMS[gpu]))
    limit = max(limits, key=lambda name: limits[name])
    # Blocks of an SM share what limits them; the last wave has as many as are left.
    per_sm = math.ceil(tiles / SMS[gpu])
    steps = math.ceil(layer.steps() / parts)
    loop, rest = per_sm * steps * limits[limit] / CLOCK[gpu], per_sm * around / CLOCK[gpu]
    if parts > 1:
        rest += parts * pixels * layer.C_out * 4 / data.l2_bytes_per_s
    moved = ELEMENT * (pixels * (layer.C_in + layer.C_out) + layer.C_in * layer.C_out * layer.kernel**2)
    memory = moved / data.bytes_per_s
    if memory > loop + rest:
        return memory, "memory"
    return loop + rest, limit if loop > rest else "instructions around the loop"


def least_time(layer: Layer, batch: int, gpu: str) -> float:
    """Seconds by peaks alone: tensor cores and memory."""
    data = GPUS[gpu]
    pixels = batch * layer.side**2
    flop = 2 * pixels * layer.C_in * layer.C_out * layer.kernel**2
    moved = ELEMENT * (pixels * (layer.C_in + layer.C_out) + layer.C_in * layer.C_out * layer.kernel**2)
    return max(flop / data.flop_per_s["float16"], moved / data.bytes_per_s)


KERNEL_HEAD = (
    "| kernel | tile | instructions / step | of copying warps | static | divisions / step | before the loop "
    "| divisions there | behind it | store | registers | shared | spills | blocks / SM | bytes / step "
    "| issue | tensor | shared memory | L2 |"
)
LAYER_HEAD = "| layer | kernel | steps | tiles | parts | calculated, µs | limited by | peaks alone, µs | ratio |"


def kernel_line(f: Figures, gpu: str) -> str:
    """A row of the first table."""
    tile = "x".join(map(str, f.instance.tile[:2])) or "-"
    name = f.instance.kernel + (", gradient" if f.gradient else "")
    limits = [f"{cycles:.0f}" for cycles in f.limits(gpu).values()] if f.instance.tile else ["-"] * 4
    cells = [name, tile, f"{f.loop:.0f}", f"{f.copying:.0f}" if f.copying else "-", f.static, f.loop_divisions]
    cells += [f.before, f.before_divisions, f.behind or "-", f.store or "-", f.registers, f.shared_bytes]
    return f"| {' | '.join(map(str, [*cells, f.spills, f.blocks, f.step_bytes or '-', *limits]))} |"


def layer_line(layer: Layer, batch: int, gpu: str, found: list[Figures]) -> str:
    """A row of the second table."""
    kernel, tile, parts = choice(layer, batch, gpu)
    f = next(f for f in found if f.instance.kernel == kernel and f.instance.tile[:2] == tile and not f.gradient)
    seconds, limit = layer_time(layer, batch, gpu, f, parts)
    least = least_time(layer, batch, gpu)
    name = f"{layer.kernel}x{layer.kernel} {layer.C_in} to {layer.C_out}, {layer.side}x{layer.side}"
    tiles = math.ceil(batch * layer.side**2 / tile[0]) * math.ceil(layer.C_out / tile[1])
    cells = [name, f"{kernel} {tile[0]}x{tile[1]}", layer.steps(), tiles, parts, f"{1e6 * seconds:.1f}", limit]
    return f"| {' | '.join(map(str, cells))} | {1e6 * least:.1f} | {least / seconds:.0%} |"


def table(head: str, lines: list[str]) -> str:
    """A table in Markdown."""
    return "\n".join([head, "|---" * (head.count("|") - 1) + "|", *lines])


def main() -> int:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", default="H200", choices=list(SMS))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="compilers run at once")
    parser.add_argument("--out", type=Path, help="file for the tables")
    arguments = parser.parse_args()
    nvcc, cuobjdump = ninja_build.platform_facts(os.environ).nvcc, compile_cuda.find_cuobjdump()
    if nvcc is None or cuobjdump is None:
        print(f"kernel_figures: expected nvcc and cuobjdump, got {nvcc} and {cuobjdump}. Hint: pip install triton")
        return 1
    gpu, arch = arguments.gpu, ARCH[arguments.gpu]
    names = [*SOURCES, *([WARPGROUP_SOURCE] if arch == "90a" else [])]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        parts = list(pool.map(lambda name: compiled(name, arch, nvcc, cuobjdump), names))
        parts.append(triton_forward(arch, cuobjdump))
    order = [*compile_cuda.NAMES.values(), "Triton forward"]
    found = sorted(
        (f for part in parts for f in part), key=lambda f: (order.index(f.instance.kernel), f.gradient, f.instance.tile)
    )
    text = table(KERNEL_HEAD, [kernel_line(f, gpu) for f in found]) + "\n\n"
    text += table(LAYER_HEAD, [layer_line(layer, arguments.batch, gpu, found) for layer in LAYERS]) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
