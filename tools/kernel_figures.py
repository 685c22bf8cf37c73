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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benches.roofline import GPUS, Gpu
from tools import compile_cuda, ninja_build
from tools.code_figures import ARCH, CLOCK, ELEMENT, SCHEDULERS, SMS, STEP, Figures, compiled, triton_forward

SOURCES = ("gathered_conv2d_half", "channel_pack", "channel_unpack")
WARPGROUP_SOURCE = "warpgroup_conv2d_half"


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
    parser = argparse.ArgumentParser(
        prog="python -m tools.kernel_figures", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
