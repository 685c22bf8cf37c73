"""The cases of a family: calls of the ops that launch it, small, ragged and with every tile, against float64.

Which calls launch a family the library says itself. Everything that lists or switches leave out holds NaN.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import bap_kernels
from bap_kernels import reference
from bap_kernels._load import _C
from bap_kernels.testing import (
    TOLERANCES,
    Case,
    Sample,
    index_list,
    lay_out,
    make_fused,
    make_tensors,
    moved,
    poison,
)
from bap_kernels.testing_switched import expected_gradients, make_switched, poison_switched
from bap_kernels.verify.device import Device
from bap_kernels.verify.exercise import Step, exercise

__all__ = ["Check", "Problem", "checks", "problems"]

DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
# As `TOLERANCES`; tensor cores cut the operands of TF32 to eleven bits.
_TF32 = (4e-3, 6e-3)
_FLAGS = ("in_scale", "in_shift", "in_relu", "out_scale", "out_shift", "residual", "out_relu")
_EPILOGUE = _FLAGS[3:]
_GRADIENTS = {"input_gradient": 0, "weight_gradient": 1}


@dataclass(frozen=True)
class Problem:
    """One call of an op.

    Args:
        op: a name in ``torch.ops.bap_kernels``.
        case: its sizes, options and kinds of lists.
        block: the in-list consists of aligned blocks of so many channels, out of order; 0: as ``case`` has it.
        flags: what is fused, as in :func:`bap_kernels.testing.make_fused`.
        dual_store: the kind of the list of a second store.
        mask: which gradients are asked for.
        off_gradient: of switches.
        tiles: whether Triton runs it with each of its tiles, not with its own choice alone.
    """

    op: str
    case: Case
    block: int = 0
    flags: tuple[str, ...] = ()
    dual_store: str | None = None
    mask: tuple[bool, ...] = ()
    off_gradient: bool = True
    tiles: bool = False

    def __str__(self) -> str:
        c = self.case
        what = [self.op.removeprefix("_"), f"{c.batch}x{c.in_channels}x{c.size[0]}x{c.size[1]}"]
        what += [f"{c.kernel[0]}x{c.kernel[1]} to {c.out_channels}", c.layout]
        what += [f"blocks of {self.block}" if self.block else f"{c.in_list} in-list", *self.flags]
        return " ".join(what)


def problems(math: str, sm_count: int) -> list[Problem]:
    """The calls among which each family finds its own, the smallest first.

    Args:
        sm_count: of the device; so many tiles of 128 x 128 make the CUDA kernels take large ones.
    """
    rows, side = 64 * sm_count + 1, 24
    plain, backward, switched = "gathered_conv2d", "gathered_conv2d_backward", "switched_conv2d"
    fused, mixed = "_gathered_conv2d_fused", "_gathered_conv2d_mixed"
    small = Case(in_channels=40, out_channels=36, size=(9, 11), dtype=DTYPES[math], in_list="null")
    last = small.but(layout="channels_last")
    point = small.but(kernel=(1, 1), padding=(0, 0, 0, 0), size=(8, 8))
    odd = small.but(in_list="odd", out_list="odd")
    bent = {"stride": (2, 1), "padding": (2, 0, 1, 3), "dilation": (2, 1)}
    many = -(-rows // side**2)
    large = last.but(batch=many, out_channels=200, size=(side, side), out_list="null")
    # Planes are a grid each: of one tile of pixels and two of filters.
    planes = point.but(batch=-(-rows // 64), in_list="odd", size=(16, 8), out_channels=200, out_list="null")
    # Sums of 27 steps and more of few tiles, which are cut into parts, on large devices.
    long = last.but(in_channels=136, size=(5, 7), out_list="null")
    heavy = last.but(in_channels=136, out_channels=72, out_list="null")
    wide = large.but(kernel=(1, 1), padding=(0, 0, 0, 0), batch=2 * many, out_channels=256)
    found = [
        Problem(plain, last, tiles=True),
        Problem(plain, last.but(**bent), block=8),
        Problem(plain, last.but(kernel=(1, 1), padding=(0, 0, 0, 0), out_channels=20), block=16),
        Problem(plain, point.but(in_list="shuffled", out_list="odd"), tiles=True),
        Problem(plain, point.but(in_list="odd", size=(7, 7))),
        Problem(plain, odd, tiles=True),
        Problem(plain, odd.but(**bent)),
        Problem(plain, odd.but(layout="channels_last", in_list="shuffled", out_channels=150)),
        Problem(plain, odd.but(kernel=(5, 5), padding=(2, 2, 2, 2), stride=(2, 2), layout="sliced")),
        Problem(fused, last.but(in_channels=24, out_channels=35), flags=_EPILOGUE, dual_store="odd"),
        Problem(fused, point.but(in_channels=24, in_list="odd"), flags=_FLAGS),
        Problem(fused, point.but(in_list="shuffled", out_list="null"), flags=_EPILOGUE, dual_store="odd"),
        Problem(plain, point.but(batch=5, in_channels=130), block=16),
        Problem(fused, odd.but(in_channels=24), flags=_FLAGS, dual_store="shuffled"),
        Problem(plain, long),
        Problem(plain, long.but(in_channels=264, out_channels=72, **bent), block=8),
        Problem(plain, long.but(in_channels=1100, kernel=(1, 1), padding=(0, 0, 0, 0), in_list="odd", out_channels=20)),
        Problem(fused, long.but(out_channels=72, out_list="odd"), flags=_EPILOGUE, dual_store="odd"),
        # Tiles of WGMMA, where the device has them.
        Problem(plain, long.but(batch=max(4, sm_count // 6), out_channels=136)),
        Problem(plain, large),
        Problem(plain, large.but(out_channels=256, in_channels=64, kernel=(3, 2)), block=8),
        Problem(fused, large.but(in_channels=24), flags=_EPILOGUE, dual_store="odd"),
        Problem(plain, planes),
        Problem(plain, large.but(layout="contiguous", in_list="odd", out_channels=150)),
        Problem(plain, wide),
        Problem(backward, last, mask=(True, False, False), tiles=True),
        Problem(backward, last.but(stride=(2, 2)), block=8, mask=(True, True, False)),
        Problem(backward, odd.but(stride=(1, 2), dilation=(2, 1)), mask=(True, True, True)),
        Problem(backward, long.but(in_channels=36, out_channels=136), mask=(True, False, False)),
        Problem(
            backward, long.but(in_channels=80, out_channels=520, stride=(2, 1)), block=8, mask=(True, False, False)
        ),
        Problem(backward, last, mask=(False, True, False), tiles=True),
        Problem(backward, last.but(batch=5, size=(17, 13)), block=16, mask=(False, True, False)),
        # Apart, so that no family is blamed for another.
        Problem(backward, point.but(in_list="odd"), mask=(True, False, False)),
        Problem(backward, point.but(in_list="odd"), mask=(False, True, False)),
        Problem(backward, point.but(in_list="shuffled", size=(7, 9)), mask=(True, False, False)),
        Problem(backward, large.but(in_channels=136, out_channels=72, batch=2 * many), mask=(True, False, False)),
        Problem(backward, large.but(in_channels=136, out_channels=72), mask=(False, True, False)),
        # Small, of the tiles of WGMMA.
        Problem(backward, heavy.but(stride=(2, 1)), mask=(False, True, False)),
        Problem(backward, heavy.but(in_channels=256, out_channels=131, **bent), block=8, mask=(False, True, False)),
        Problem(backward, wide.but(in_channels=256, out_channels=64), mask=(True, False, False)),
    ]
    for case, off in ((odd, True), (odd.but(layout="channels_last", in_list="shuffled"), False), (point, False)):
        case = case.but(in_list="odd") if case is point else case
        found.append(Problem(switched, case, tiles=case is odd))
        found.append(Problem(f"{switched}_backward", case, mask=(True,) * 4, off_gradient=off, tiles=case is odd))
    found.append(Problem(f"{switched}_backward", odd.but(stride=(2, 2)), mask=(True, True, False, True)))
    found.append(Problem(f"{switched}_backward", odd, mask=(False, False, True, True)))
    for case in (odd, last, point, last.but(kernel=(1, 1), padding=(0, 0, 0, 0), stride=(2, 2))):
        found.append(Problem(mixed, case.but(batch=6), tiles=case is last))
        found.append(Problem(mixed, case.but(batch=6, in_channels=48), block=8))
    found.append(Problem(mixed, long.but(batch=6, in_channels=264), block=8))
    return found


def blocks_of(b: int, channels: int, seed: int) -> Tensor:
    """A list of most of the aligned blocks, out of order, int32."""
    count = channels // b
    chosen = random.Random(seed).sample(range(count), max(1, count - 1))
    return torch.tensor([b * c + d for c in chosen for d in range(b)], dtype=torch.int32)


@dataclass
class _Call:
    """An op's arguments and what has to come out: for each result that is compared its place, values and depth.

    Args:
        alone: see :func:`bap_kernels.verify.exercise.exercise`.
    """

    arguments: tuple[Any, ...]
    expected: list[tuple[int, Tensor, int]]
    alone: tuple[int, ...] = ()


def _sample(problem: Problem) -> Sample:
    sample = make_tensors(problem.case)
    if problem.block:
        sample.in_index = blocks_of(problem.block, problem.case.in_channels, problem.case.seed)
    return poison(sample)


def _grad_of(shape: Sequence[int], case: Case) -> Tensor:
    generator = torch.Generator().manual_seed(case.seed + 1)
    grad = torch.randn(tuple(shape), generator=generator, dtype=torch.float64).to(case.dtype)
    return lay_out(grad, "channels_last" if case.layout == "channels_last" else "contiguous")


def _forward(problem: Problem) -> _Call:
    sample = _sample(problem)
    if problem.op == "gathered_conv2d":
        return _Call(sample.args, [(0, reference.conv_on_selected(*sample.args), sample.depth)])
    fused = make_fused(sample, problem.flags, torch.float32, problem.case.layout)
    expected = _fused_reference(sample, fused)
    dual = None
    if problem.dual_store:
        dual = index_list(problem.dual_store, sample.kept[1], random.Random(problem.case.seed))
    arguments = (*sample.args, *(fused[name] for name in _FLAGS), False, None, dual)
    results = [(0, expected, 4 * sample.depth + 4)]
    if dual is not None:
        results.append((1, expected.index_select(1, dual), 4 * sample.depth + 4))
    return _Call(arguments, results)


def _fused_reference(sample: Sample, fused: dict[str, Any]) -> Tensor:
    """As ``reference.gathered_conv2d_fused``, by PyTorch's operators in float64."""

    def column(name: str) -> Tensor:
        return fused[name].double()[:, None, None]

    listed = slice(None) if sample.in_index is None else sample.in_index.long()
    x = sample.input.double()[:, listed]
    x = x if fused["in_scale"] is None else x * column("in_scale")
    x = x if fused["in_shift"] is None else x + column("in_shift")
    x = x.relu() if fused["in_relu"] else x
    weight = sample.weight.double()[:, listed]
    bias = None if sample.bias is None else sample.bias.double()
    y = reference.conv_on_selected(x, weight, bias, None, *sample.args[4:])
    y = y if fused["out_scale"] is None else y * column("out_scale")
    y = y if fused["out_shift"] is None else y + column("out_shift")
    y = y if fused["residual"] is None else y + fused["residual"].double()
    return y.relu() if fused["out_relu"] else y


def _backward(problem: Problem) -> _Call:
    sample = _sample(problem)
    grad = _grad_of(sample.output_shape, problem.case)
    leaves = [t.double().requires_grad_() for t in (sample.input, sample.weight, sample.bias) if t is not None]
    with torch.enable_grad():
        bias = leaves[2] if sample.bias is not None else None
        y = reference.conv_on_selected(leaves[0], leaves[1], bias, *sample.args[3:])
        gradients = torch.autograd.grad(y, leaves, grad.double())
    N, _, oH, oW = sample.output_shape
    taps = sample.weight.shape[2] * sample.weight.shape[3]
    depths = (taps * taps * sample.kept[1], N * oH * oW, N * oH * oW)
    wanted = [(i, gradients[i], depths[i]) for i in range(3) if problem.mask[i]]
    return _Call((grad, *sample.args[:2], *sample.args[3:], problem.mask), wanted)


def _switched(problem: Problem) -> _Call:
    case = problem.case.but(out_list="null")
    clean, sample = make_switched(case), make_switched(case)
    if problem.op == "switched_conv2d":
        expected = reference.conv_on_masked(*clean.args)
        return _Call((*poison_switched(sample).args, True), [(0, expected, sample.depth)])
    grad = _grad_of(sample.output_shape, case)
    with torch.enable_grad():
        gradients = expected_gradients(clean, grad, problem.off_gradient)
    if not problem.off_gradient:
        poison_switched(sample)
    N, filters, oH, oW = sample.output_shape
    taps, pixels = sample.weight.shape[2] * sample.weight.shape[3], N * oH * oW
    images = N if case.dtype.itemsize == 2 else 1
    depths = (taps * taps * filters, images * pixels, pixels, taps * taps * filters * images * pixels)
    wanted = [(i, gradients[i], depths[i]) for i in range(4) if problem.mask[i]]
    return _Call((grad, *sample.backward_args, problem.off_gradient, problem.mask), wanted)


def _mixed(problem: Problem) -> _Call:
    case, counts = problem.case, (2, 1, 0, 3)
    sample = make_tensors(case.but(in_list="null", out_list="null"))
    if problem.block:
        lists = [blocks_of(problem.block, case.in_channels, seed) for seed in range(4)]
    else:
        drawn = [index_list("odd", case.in_channels, random.Random(seed)) for seed in range(3)]
        lists = [*drawn, index_list("null", case.in_channels, random.Random(0))]  # type: ignore[list-item]
    options = (sample.stride, sample.padding, sample.dilation)
    parts = zip(sample.input.split(list(counts)), lists, strict=True)
    expected = torch.cat(
        [reference.conv_on_selected(x, sample.weight, sample.bias, one, None, *options, 1) for x, one in parts]
    )
    # What no list of a run names reaches none of its results.
    first = 0
    for count, one in zip(counts, lists, strict=True):
        if one is not None:
            off = [c for c in range(case.in_channels) if c not in set(one.tolist())]
            sample.input[first : first + count, off] = torch.nan
        first += count
    # Its weights are kept packed: where they are packed anew, a call cannot be captured.
    return _Call((*sample.args[:3], lists, counts, *options, True), [(0, expected, sample.depth)], alone=(1,))


def call_of(problem: Problem) -> _Call:
    """A problem's tensors."""
    if problem.op.startswith("switched"):
        return _switched(problem)
    if problem.op == "_gathered_conv2d_mixed":
        return _mixed(problem)
    return _backward(problem) if problem.op.endswith("backward") else _forward(problem)


def _close(actual: Tensor, expected: Tensor, math: str, depth: int) -> None:
    rtol, atol = _TF32 if math == "tf32" else TOLERANCES[DTYPES[math]]
    atol *= max(1, depth) ** 0.5
    torch.testing.assert_close(actual.cpu().double(), expected, rtol=rtol, atol=atol)


@dataclass(frozen=True)
class Check:
    """A case of a family.

    Args:
        text: the case in words.
        config: the tile that Triton is made to take; None: its own choice.
    """

    text: str
    backend: str
    math: str
    problem: Problem
    call: _Call = field(repr=False)
    config: Any = None

    def run(self, device: Device, step: Step) -> None:
        """Raises where something is wrong."""
        op = getattr(torch.ops.bap_kernels, self.problem.op).default

        def run(*arguments: Any) -> list[Tensor]:
            with bap_kernels.use_backend(self.backend), self._tile():
                results = op(*arguments)
            results = results if isinstance(results, (tuple, list)) else (results,)
            return [results[place] for place, _, _ in self.call.expected]

        def compare(results: Sequence[Tensor]) -> None:
            for result, (_, expected, depth) in zip(results, self.call.expected, strict=True):
                _close(result, expected, self.math, depth)

        exercise(run, self.call.arguments, compare, device, step, self.call.alone)

    def _tile(self) -> contextlib.AbstractContextManager:
        if self.config is None:
            return contextlib.nullcontext()
        from bap_kernels.triton import configs

        return configs.overriding(self.config)


def _on(value: Any, device: torch.device) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_on(each, device) for each in value)
    return moved(value, device) if isinstance(value, Tensor) else value


def _tiles_of(backend: str, math: str, device: Device) -> list[Any]:
    if backend != "triton":
        return []
    from bap_kernels.triton import configs

    products = {"float32": "ieee", "tf32": "tf32"}.get(math, "16")
    return list(dict.fromkeys(configs.TABLE[configs.architecture(device.capability).table, products].values()))


def checks(family: str, device: Device) -> Iterator[Check]:
    """The cases of a family on a device."""
    backend, kernel, math = family.split("/")
    torch.backends.cudnn.allow_tf32 = math == "tf32"
    for problem in problems(math, device.sm_count):
        special = next((name for name in ("switched", "mixed") if name in problem.op), "")
        if (special and special != kernel) or (kernel in _GRADIENTS and not problem.op.endswith("backward")):
            continue
        call = call_of(problem)
        if family not in _C.call_families(problem.op, _on(call.arguments, device.torch_device)):
            continue
        yield Check(str(problem), backend, math, problem, call)
        for config in _tiles_of(backend, math, device) if problem.tiles else ():
            yield Check(f"{problem}, {config}", backend, math, problem, call, config)
