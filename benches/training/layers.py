"""Forward and backward of one convolution with switches, with an output gradient without zeros.

Variants, all differentiated by autograd in the input and, if weights are trained, in the weight:
    auto:   the package's ``switched_conv2d``, also differentiated in the switch
    masked: ``F.conv2d(x * s, w)``, likewise; the reference
    dense:  ``F.conv2d(x, w)``, without switches
    naive:  ``F.conv2d(x.index_select(1, on), w.index_select(1, on))``, without gradients of switches
Backends of the package, such as ``triton``, can be added by name.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import cycle

import torch
import torch.nn.functional as F
from torch import Tensor

from benches import gate, memory, ours
from benches.cases import Cell
from benches.problem import NumberStore, Problem
from benches.rows import Row, row_of, with_ratios
from benches.timers import Marks, Spread, Timed
from benches.training.bench import CPU, TrainingBench, passing, phases
from benches.training.cells import LayerCell

VARIANTS = ("masked", "dense", "naive", "auto")
# Output gradients must not be correlated with inputs.
GRADIENT_SEED = 1

Forward = Callable[[Tensor], Tensor]


@dataclass
class Variant(Timed):
    """A convolution with its backward; each run is one forward and backward.

    Args:
        forward: The convolution.
        leaves: Tensors, by name, that get a gradient besides the input.
        gradients: Pool of output gradients, used in turn.
        marks: Time stamps of every forward and backward.
    """

    forward: Forward = F.relu
    leaves: dict[str, Tensor] = field(default_factory=dict)
    gradients: Sequence[Tensor] = ()
    marks: list[Marks] = field(default_factory=list)

    def __post_init__(self) -> None:
        gradients = cycle(self.gradients)
        self.run = lambda x: self.differentiate(x, next(gradients))

    def differentiate(self, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
        """Return result and gradients by name."""
        marks = Marks(x.device)
        marks.mark()
        y = self.forward(x)
        marks.mark()
        gradients = torch.autograd.grad(y, [x, *self.leaves.values()], grad)
        marks.mark()
        self.marks.append(marks)
        return dict(zip(("result", "input", *self.leaves), (y.detach(), *gradients), strict=True))


@dataclass
class Layer:
    """Tensors of one cell."""

    problem: Problem
    gradients: list[Tensor]
    switch: Tensor

    def lengths(self) -> dict[str, int]:
        """Number of products summed per element of the result and of each gradient, for the tolerance."""
        weight, grad = self.problem.weight, self.gradients[0]
        pixels = grad[:, 0].numel()
        depth = weight[:, 0].numel()
        x = self.problem.inputs[0]
        return {"result": weight[0].numel(), "input": depth, "weight": pixels, "switch": depth + x[:, 0].numel()}

    def reference(self, masked: bool) -> dict[str, Tensor]:
        """Result and gradients of the masked or the dense convolution, by autograd in float64."""
        x, weight, switch = (
            t.detach().double().requires_grad_() for t in (self.problem.inputs[0], self.problem.weight, self.switch)
        )
        leaves = {"input": x, "weight": weight} | ({"switch": switch} if masked else {})
        y = F.conv2d(x * switch.view(1, -1, 1, 1) if masked else x, weight, None, *self.problem.conv_args)
        gradients = torch.autograd.grad(y, list(leaves.values()), self.gradients[0].double())
        return dict(zip(("result", *leaves), (y.detach(), *gradients), strict=True))

    def variant(self, name: str, mode: str) -> Variant:
        """Prepare a variant.

        Raises:
            ValueError: If the name is neither in `VARIANTS` nor a backend.
        """
        problem = self.problem
        stride, padding = problem.conv_args
        weight = problem.weight.detach().requires_grad_(mode == "trained")
        switch = self.switch.detach().requires_grad_()
        index = problem.in_index
        leaves = {"weight": weight} if weight.requires_grad else {}
        enter = Timed.enter
        forwards: dict[str, Forward] = {
            "masked": lambda x: F.conv2d(x * switch.view(1, -1, 1, 1), weight, None, stride, padding),
            "dense": lambda x: F.conv2d(x, weight, None, stride, padding),
            "naive": lambda x: F.conv2d(x.index_select(1, index), weight.index_select(1, index), None, stride, padding),
        }
        if name in ours.BACKENDS:
            op, enter = ours.package().switched_conv2d, partial(ours.package().use_backend, name)
            forwards[name] = lambda x: op(x, weight, None, switch, stride, padding)
        if name not in forwards:
            known = tuple(dict.fromkeys((*VARIANTS, *ours.BACKENDS)))
            raise ValueError(f"variant(): expected `name` to be one of {', '.join(known)}, got {name!r}.")
        if name not in ("dense", "naive"):
            leaves = {**leaves, "switch": switch}
        forward = forwards[name]
        return Variant(forward, problem.inputs, enter, forward=forward, leaves=leaves, gradients=self.gradients)


class LayerBench(TrainingBench):
    """Measures single convolutions; peak memory on the CPU in a separate process."""

    min_rounds = {"cpu": 5, "cuda": 30}  # noqa: RUF012
    max_rounds = {"cpu": 30, "cuda": 100}  # noqa: RUF012

    def __init__(self, peaks: bool = True, device: torch.device = CPU) -> None:
        super().__init__(peaks, device)
        self.inputs = NumberStore(torch.float32, device)
        self.grads = NumberStore(torch.float32, device, GRADIENT_SEED)
        self._worker: ProcessPoolExecutor | None = None
        # The two modes of a case follow one another.
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

    def check(self, name: str, variant: Variant, cell: LayerCell) -> float:
        """Check result and gradients of a variant; return the largest error relative to the largest value.

        Raises:
            WrongResultError: If one is wrong, or has another memory format than the input.
        """
        # The dense convolution is the same at all densities.
        key = replace(cell, cell=replace(cell.cell, density=1.0)).id
        if name == "dense" and key in self._dense_errors:
            return self._dense_errors[key]
        layer = self.layer(cell.cell)
        reference, lengths = self._reference(cell.cell, name != "dense"), layer.lengths()
        variant.enter()
        results = variant.differentiate(layer.problem.inputs[0], layer.gradients[0])
        largest = 0.0
        for what, value in results.items():
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
        """Stop the process that measures peaks."""
        if self._worker is not None:
            self._worker.shutdown()
            self._worker = None

    def rows(self, cell: LayerCell, names: Sequence[str], seconds: float) -> list[Row]:
        """Measure one cell in about ``seconds``, in at least five rounds.

        Raises:
            WrongResultError: If a result or gradient of one of `VARIANTS` is wrong.
            NotImplementedError: If the package cannot run the cell.
        """
        start = time.perf_counter()
        layer = self.layer(cell.cell)
        problem = layer.problem
        variants = {name: layer.variant(name, cell.mode) for name in names}
        errors = passing(names, lambda name: self.check(name, variants[name], cell), self.skipped, VARIANTS)
        variants = {name: variants[name] for name in errors}
        saved, peaks = {}, {}
        for name, variant in variants.items():
            saved[name] = memory.saved_bytes(
                partial(variant.forward, problem.inputs[0]), [problem.weight, layer.switch]
            )
            peaks[name] = self._peak(cell, name)
            variant.marks.clear()
        samples = self.samples(variants, seconds - (time.perf_counter() - start))
        return with_ratios(
            row_of(
                cell.cell,
                Spread.of(samples[name]),
                useful_flop(cell, problem, dense=name == "dense"),
                cell=cell.id,
                **cell.cell.row_fields,
                variant=name,
                device=self.device.type,
                inputs="rotated" if problem.rotated else "warm",
                max_error=errors[name],
                mode=cell.mode,
                saved_bytes=saved[name],
                peak_bytes=peaks[name],
                **phases(variant.marks),
            )
            for name, variant in variants.items()
        )


def layer_peak(cell: LayerCell, name: str) -> int:
    """Peak of one forward with backward, after one that allocates what kernels keep between calls."""
    return _peak_beyond_first(_worker_bench().layer(cell.cell).variant(name, cell.mode), memory.peak_bytes)


def _peak_beyond_first(variant: Variant, peak_bytes: Callable[[Callable[[], object]], int]) -> int:
    variant.enter()
    variant.run(variant.inputs[0])
    return peak_bytes(lambda: variant.run(variant.inputs[0]))


@lru_cache(maxsize=1)
def _worker_bench() -> LayerBench:
    return LayerBench(peaks=False)


def useful_flop(cell: LayerCell, problem: Problem, dense: bool) -> float:
    """FLOP (2 per multiply-add) of forward and gradients.

    Forward and weight gradient need the channels that are on; the input gradient needs all, because the gradients of
    the switches that are off come from it.
    """
    full, kept = problem.work(dense=True)[0], problem.work(dense=dense)[0]
    return full + kept * (2 if cell.mode == "trained" else 1)
