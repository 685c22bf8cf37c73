"""What the machine code of one GPU kernel says about its speed: instructions, divisions, registers, cycles by limit."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benches.roofline import GPUS
from tools import compile_cuda
from tools.compile_cuda import Instance
from tools.machine_code import Code, Instruction, Loop, divisions

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
        >>> from tools.code_figures import is_gradient
        >>> is_gradient("gathered_conv2d_kernelILi2EEELb1EEEv"), is_gradient("gathered_conv2d_kernelILi2EEELb0EEEv")
        (True, False)
    """
    return "Lb1E" in mangled
