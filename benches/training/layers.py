"""Forward and backward of one convolution with switches, with an output gradient that has no zeros.

Variants, all differentiated by autograd in the input and, where weights are trained, in the weight:
    auto:   the package's ``switched_conv2d``; also differentiated in the switch
    masked: ``F.conv2d(x * s, w)``, likewise: the reference
    dense:  ``F.conv2d(x, w)``, without switches
    naive:  ``F.conv2d(x.index_select(1, on), w.index_select(1, on))``: no gradient for switches that are off, nor on
Beside ``auto``, a backend of the package can be named, such as ``triton``.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import count
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from benches import gate, memory, ours
from benches.cases import Cell
from benches.problem import NumberStore, Problem
from benches.rows import Row, row_of, with_ratios
from benches.timers import Marks, Spread, Timed, clock, interleave
from benches.training.backends import gated
from benches.training.cells import LayerCell

BASELINES = ("masked", "dense", "naive", "auto")
CPU = torch.device("cpu")
MIN_ROUNDS, MAX_ROUNDS = {"cpu": 5, "cuda": 30}, {"cpu": 30, "cuda": 100}
# Inputs and output gradients must not be correlated.
GRADIENT_SEED = 1

Forward = Callable[[Tensor], Tensor]


@dataclass
class Variant(Timed):
    """A convolution that is differentiated in each run.

    Args:
        forward: The convolution.
        leaves: What it is differentiated in beside the input, by name.
        gradients: Pool of output gradients, rotated through.
        marks: Around every forward and backward.
    """

    forward: Forward = F.relu
    leaves: dict[str, Tensor] = field(default_factory=dict)
    gradients: Sequence[Tensor] = ()
    marks: list[Marks] = field(default_factory=list)

    def __post_init__(self) -> None:
        turn = count()
        self.run = lambda x: self.differentiate(x, self.gradients[next(turn) % len(self.gradients)])

    def differentiate(self, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
        """Return the result and the gradients, by name."""
        marks = Marks(x.device)
        marks.mark()
        y = self.forward(x)
        marks.mark()
        found = torch.autograd.grad(y, [x, *self.leaves.values()], grad)
        marks.mark()
        self.marks.append(marks)
        return dict(zip(("result", "input", *self.leaves), (y.detach(), *found), strict=True))


@dataclass
class Layer:
    """Tensors of one cell."""

    problem: Problem
    gradients: list[Tensor]
    switch: Tensor

    def lengths(self) -> dict[str, int]:
        """Products summed for one element of the result and of each gradient, for the gate's tolerance."""
        weight, grad = self.problem.weight, self.gradients[0]
        pixels = grad[:, 0].numel()
        depth = weight[:, 0].numel()
        x = self.problem.inputs[0]
        return {"result": weight[0].numel(), "input": depth, "weight": pixels, "switch": depth + x[:, 0].numel()}

    def reference(self, masked: bool) -> dict[str, Tensor]:
        """Result and gradients of the masked or of the dense convolution, by autograd in float64."""
        x, weight, switch = (
            t.detach().double().requires_grad_() for t in (self.problem.inputs[0], self.problem.weight, self.switch)
        )
        leaves = {"input": x, "weight": weight} | ({"switch": switch} if masked else {})
        y = F.conv2d(x * switch.view(1, -1, 1, 1) if masked else x, weight, None, *self.problem.conv_args)
        found = torch.autograd.grad(y, list(leaves.values()), self.gradients[0].double())
        return dict(zip(("result", *leaves), (y.detach(), *found), strict=True))

    def variant(self, name: str, mode: str) -> Variant:
        """Prepare a variant.

        Raises:
            ValueError: If the name is none of `BASELINES`, nor a backend's.
        """
        problem = self.problem
        stride, padding = problem.conv_args
        weight = problem.weight.detach().requires_grad_(mode == "trained")
        switch = self.switch.detach().requires_grad_()
        index = problem.in_index
        leaves = {"weight": weight} if weight.requires_grad else {}
        enter = Timed.enter
        if name in ours.BACKENDS:
            op, use = ours.package().switched_conv2d, ours.package().use_backend
            forward: Forward = lambda x: op(x, weight, None, switch, stride, padding)  # noqa: E731
            enter = lambda: use(name)  # noqa: E731
        elif name == "masked":
            forward = lambda x: F.conv2d(x * switch.view(1, -1, 1, 1), weight, None, stride, padding)  # noqa: E731
        elif name == "dense":
            forward = lambda x: F.conv2d(x, weight, None, stride, padding)  # noqa: E731
        elif name == "naive":
            forward = lambda x: F.conv2d(  # noqa: E731
                x.index_select(1, index), weight.index_select(1, index), None, stride, padding
            )
        else:
            known = tuple(dict.fromkeys((*BASELINES, *ours.BACKENDS)))
            raise ValueError(f"variant(): expected `name` to be one of {', '.join(known)}, got {name!r}.")
        if name not in ("dense", "naive"):
            leaves = {**leaves, "switch": switch}
        return Variant(forward, problem.inputs, enter, forward=forward, leaves=leaves, gradients=self.gradients)


class LayerBench:
    """Measures cells one after the other.

    Args:
        peaks: Whether peaks of memory are measured: on the CPU in a process of their own.
        device: Where to measure.
    """

    def __init__(self, peaks: bool = True, device: torch.device = CPU) -> None:
        self.device = device
        self.inputs = NumberStore(torch.float32, device)
        self.grads = NumberStore(torch.float32, device, GRADIENT_SEED)
        self.clock = clock(device)
        self.peaks = peaks and (device.type == "cuda" or memory.can_measure_peak())
        # Why named backends lack cells.
        self.left_out: list[str] = []
        self._worker: ProcessPoolExecutor | None = None
        # Both modes of a case follow one another.
        self.layer = lru_cache(maxsize=1)(self._layer)
        self._reference = lru_cache(maxsize=2)(lambda cell, masked: self.layer(cell).reference(masked))
        self._dense_errors: dict[str, float] = {}

    def _layer(self, cell: Cell) -> Layer:
        problem = Problem.make(cell, self.inputs, torch.float32, self.device)
        problem.inputs = [x.detach().requires_grad_() for x in problem.inputs]
        shape = (cell.batch, cell.case.C_out, *cell.case.output_size)
        switch = torch.zeros(cell.case.C_in, device=self.device)
        switch[problem.in_index.long()] = 1
        return Layer(problem, self.grads.pool(shape, cell.layout)[0], switch)

    def gated(self, name: str, variant: Variant, cell: LayerCell) -> float:
        """Check the result and every gradient of a variant; return the largest error over the largest value.

        Raises:
            WrongResultError: If one is wrong, or ours are in another memory format than the input.
        """
        # The dense convolution is the same at all densities.
        key = replace(cell, cell=replace(cell.cell, density=1.0)).id
        if name == "dense" and key in self._dense_errors:
            return self._dense_errors[key]
        layer = self.layer(cell.cell)
        reference, lengths = self._reference(cell.cell, name != "dense"), layer.lengths()
        variant.enter()
        found = variant.differentiate(layer.problem.inputs[0], layer.gradients[0])
        largest = 0.0
        for what, value in found.items():
            where = f"{name} ({what}) on {cell.id}"
            if name in ours.BACKENDS and value.dim() == 4:
                gate.check_layout(where, value, cell.cell.layout)
            error = gate.check(where, value, reference[what], lengths[what])
            largest = max(largest, error / reference[what].abs().max().item())
        if name == "dense":
            self._dense_errors[key] = largest
        return largest

    def _peak(self, cell: LayerCell, name: str) -> int | None:
        if not self.peaks:
            return None
        if self.device.type == "cuda":
            return _peak_beyond_first(self.layer(cell.cell).variant(name, cell.mode), memory.cuda_peak_bytes)
        if self._worker is None:
            self._worker = memory.worker()
        return self._worker.submit(layer_peak, cell, name).result()

    def close(self) -> None:
        """End the process that measures peaks."""
        if self._worker is not None:
            self._worker.shutdown()
            self._worker = None

    def rows(self, cell: LayerCell, names: Sequence[str], seconds: float) -> list[Row]:
        """Measure one cell in about some seconds; at least five rounds are made.

        Raises:
            WrongResultError: If anything is wrong; nothing of the cell is then returned.
            NotImplementedError: If the package cannot run it.
        """
        start = time.perf_counter()
        layer = self.layer(cell.cell)
        variants = {name: layer.variant(name, cell.mode) for name in names}
        errors = gated(names, lambda name: self.gated(name, variants[name], cell), self.left_out, BASELINES)
        variants = {name: variants[name] for name in errors}
        saved, peaks = {}, {}
        for name, variant in variants.items():
            run = partial(variant.forward, layer.problem.inputs[0])
            saved[name] = memory.saved_bytes(run, [layer.problem.weight, layer.switch])
            peaks[name] = self._peak(cell, name)
            variant.marks.clear()
        left = seconds - (time.perf_counter() - start)
        kind = self.device.type
        samples = interleave(variants, self.clock, left, MIN_ROUNDS[kind], MAX_ROUNDS[kind])
        return with_ratios(
            _row(cell, layer, name, variant, Spread.of(samples[name]), errors[name], saved[name], peaks[name])
            for name, variant in variants.items()
        )


def layer_peak(cell: LayerCell, name: str) -> int:
    """Peak of one forward with backward, after one that leaves what a kernel keeps between calls."""
    return _peak_beyond_first(_worker_bench().layer(cell.cell).variant(name, cell.mode), memory.peak_bytes)


def _peak_beyond_first(variant: Variant, peak_bytes: Callable[[Callable[[], object]], int]) -> int:
    variant.enter()
    variant.run(variant.inputs[0])
    return peak_bytes(lambda: variant.run(variant.inputs[0]))


@lru_cache(maxsize=1)
def _worker_bench() -> LayerBench:
    return LayerBench(peaks=False)


def useful_flop(cell: LayerCell, problem: Problem, dense: bool) -> float:
    """FLOP, 2 per multiply-add, that the gradients ask for.

    The forward and the weight's gradient are taken of the channels that are on, the input's gradient of all: the
    switch's gradient of the others comes from it.
    """
    full, kept = problem.work(dense=True)[0], problem.work(dense=dense)[0]
    return full + kept * (2 if cell.mode == "trained" else 1)


def _row(
    cell: LayerCell,
    layer: Layer,
    name: str,
    variant: Variant,
    spread: Spread,
    error: float,
    saved: int,
    peak: int | None,
) -> Row:
    problem = layer.problem
    forward, backward = (median(part) for part in zip(*(marks.seconds() for marks in variant.marks), strict=True))
    return row_of(
        cell.cell,
        spread,
        useful_flop(cell, problem, dense=name == "dense"),
        cell=cell.id,
        **cell.cell.facts,
        variant=name,
        device=variant.inputs[0].device.type,
        inputs="rotated" if problem.rotated else "warm",
        max_error=error,
        mode=cell.mode,
        forward_s=forward,
        backward_s=backward,
        saved_bytes=saved,
        peak_bytes=peak,
    )
