"""The baselines that the package is compared with: dense, masked, naive, gather + conv and oracle.

Every variant is prepared outside the timing: weights are sliced, and packed if the variant can pack.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benches import convs, gathers
from benches.cases import Cell
from benches.problem import MEMORY_FORMATS, Problem
from benches.timers import Timed, fastest

BASELINES = ("dense", "masked", "naive", "gather_conv", "oracle", "oracle8")
# oneDNN works in blocks of 8 or 16 channels: an odd count costs it as much as the next block.
ROUNDING = 8

Clock = Callable[[Callable[[Tensor], object], Tensor], float]


@dataclass
class Variant(Timed):
    """A prepared variant.

    Args:
        candidate: The implementation that it selected, if it selects.
        all_outputs: Whether the result has all C_out channels although fewer are listed.
        length: Number of products summed per element of the result, for the tolerance.
        same_layout: Whether the result must have the cell's memory format (naive loses it, the oracle may choose).
    """

    candidate: str = ""
    all_outputs: bool = False
    length: int = 1
    same_layout: bool = True


def dense(problem: Problem) -> Variant:
    """The full convolution."""
    run = convs.plain(problem.weight, *problem.conv_args)
    return Variant(run, problem.inputs, all_outputs=True, length=problem.weight[0].numel())


def masked(problem: Problem) -> Variant:
    """The full convolution of x times the mask; with an out-list the result is masked too."""
    x = problem.inputs[0]
    in_mask = torch.zeros(1, x.shape[1], 1, 1, dtype=x.dtype, device=x.device)
    in_mask[:, problem.in_index.long()] = 1
    run = convs.plain(problem.weight, *problem.conv_args)
    length = problem.weight[0].numel()
    if problem.out_index is None:
        return Variant(lambda x: run(x * in_mask), problem.inputs, all_outputs=True, length=length)
    out_mask = torch.zeros(1, len(problem.weight), 1, 1, dtype=x.dtype, device=x.device)
    out_mask[:, problem.out_index.long()] = 1
    return Variant(lambda x: run(x * in_mask) * out_mask, problem.inputs, all_outputs=True, length=length)


def naive(problem: Problem) -> Variant:
    """Run ``x.index_select(1, list)`` and a convolution with pre-sliced weight; channels_last is lost on a CPU."""
    weight, index, (stride, padding) = problem.sliced_weight, problem.in_index, problem.conv_args
    return Variant(
        lambda x: F.conv2d(x.index_select(1, index), weight, None, stride, padding),
        problem.inputs,
        length=weight[0].numel(),
        same_layout=False,
    )


def gather_conv(problem: Problem, clock: Clock) -> Variant:
    """The fastest gather followed by the fastest convolution, measured for this cell."""
    layout, index, (stride, padding) = problem.cell.layout, problem.in_index, problem.conv_args
    example = problem.compact(problem.inputs[0])
    # A strided 1x1 convolution reads one pixel in stride^2: only those are gathered.
    strided = problem.cell.case.kernel == 1 and stride > 1
    if strided:
        example = problem.compact(problem.inputs[0][:, :, ::stride, ::stride])
        gather_by_name = gathers.alternatives(index, layout, problem.inputs[0][:, :, ::stride, ::stride])
        gather_by_name = {name: gathers.subsampled(run, stride) for name, run in gather_by_name.items()}
        stride = 1
    else:
        gather_by_name = gathers.alternatives(index, layout, example=problem.inputs[0])
    conv_by_name = convs.alternatives(problem.sliced_weight, stride, padding, layout, example)
    gather_name = fastest(gather_by_name, problem.inputs, clock)
    gather = gather_by_name[gather_name]
    chains = {name: _chain(gather, conv, MEMORY_FORMATS[layout]) for name, conv in conv_by_name.items()}
    conv_name = fastest(chains, problem.inputs, clock)
    return Variant(
        chains[conv_name],
        problem.inputs,
        candidate=f"{gather_name}+{conv_name}",
        length=problem.sliced_weight[0].numel(),
    )


def _chain(gather: gathers.Gather, conv: convs.Conv, memory_format: torch.memory_format) -> convs.Conv:
    # A compact tensor of one channel is in both memory formats: PyTorch may return the other one.
    return lambda x: conv(gather(x)).contiguous(memory_format=memory_format)


def oracle(problem: Problem, clock: Clock, pool_share: float, rounding: int = 1) -> Variant:
    """PyTorch's convolution on compact inputs: the better memory format, and the faster of ``F.conv2d`` and oneDNN.

    Args:
        problem: Tensors of the cell.
        clock: Clock to choose with.
        pool_share: Size of the pool of compact inputs relative to the problem's pool.
        rounding: Channel counts are rounded up to a multiple of this, with zero weights.
    """
    stride, padding = problem.conv_args
    K_out, K_in = problem.sliced_weight.shape[:2]
    extra_in, extra_out = -K_in % rounding, -K_out % rounding
    weight = F.pad(problem.sliced_weight, (0, 0, 0, 0, 0, extra_in, 0, extra_out))
    count = max(3, math.ceil(len(problem.inputs) * pool_share))
    alternatives: dict[str, tuple[convs.Conv, list[Tensor]]] = {}
    # Three inputs are enough to choose with; the pool is created for the fastest alone.
    for layout, memory_format in MEMORY_FORMATS.items():
        few = [_padded(problem.compact(x), extra_in, memory_format) for x in problem.inputs[:3]]
        formatted = weight.contiguous(memory_format=memory_format)
        alternatives[f"{layout}+conv2d"] = convs.plain(formatted, stride, padding), few
        if convs.can_prepack(weight):
            alternatives[f"{layout}+prepacked"] = convs.prepacked(formatted, stride, padding, few[0]), few
    name = _fastest_on_own_inputs(alternatives, clock)
    memory_format = MEMORY_FORMATS[name.split("+")[0]]
    pool = [_padded(problem.compact(x), extra_in, memory_format) for x in problem.inputs[:count]]
    conv = alternatives[name][0]
    run = (lambda x: conv(x)[:, :K_out]) if extra_out else conv
    return Variant(run, pool, candidate=name, length=weight[0].numel(), same_layout=False)


def _padded(x: Tensor, extra: int, memory_format: torch.memory_format) -> Tensor:
    # Repeated channels, not zeros, so that values are typical; their weights are zero.
    return (
        torch.cat([x, *[x[:, :1]] * extra], dim=1).contiguous(memory_format=memory_format)
        if extra
        else x.contiguous(memory_format=memory_format)
    )


def _fastest_on_own_inputs(alternatives: dict[str, tuple[convs.Conv, list[Tensor]]], clock: Clock) -> str:
    """Choose between functions whose inputs have different formats: each is bound to its own inputs."""

    def bind(run: convs.Conv, few: list[Tensor]) -> convs.Conv:
        turn = iter(range(1 << 30))
        return lambda _: run(few[next(turn) % len(few)])

    bound = {name: bind(run, few) for name, (run, few) in alternatives.items()}
    first = next(iter(alternatives.values()))[1]
    return fastest(bound, first, clock)


def prepare(name: str, problem: Problem, clock: Clock, pool_share: float = 1.0) -> Variant:
    """Prepare a variant by name.

    Raises:
        ValueError: If the name is none of `BASELINES`.
    """
    simple = {"dense": dense, "masked": masked, "naive": naive}
    if name in simple:
        return simple[name](problem)
    if name == "gather_conv":
        return gather_conv(problem, clock)
    if name in ("oracle", "oracle8"):
        return oracle(problem, clock, pool_share, rounding=ROUNDING if name == "oracle8" else 1)
    raise ValueError(f"prepare(): expected `name` to be one of {', '.join(BASELINES)}, got {name!r}.")


def applies(name: str, cell: Cell) -> bool:
    """Whether the variant differs from the others: oracle8 only if a channel count is no multiple of 8."""
    return name != "oracle8" or cell.K_in % ROUNDING != 0 or cell.K_out % ROUNDING != 0
