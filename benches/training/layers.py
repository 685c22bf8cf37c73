"""Forward and backward of one convolution with switches, with an output gradient that has no zeros.

Peers, all differentiated by autograd in the input and, where weights are trained, in the weight:
    auto:   the package's ``switched_conv2d``; also differentiated in the switch
    masked: ``F.conv2d(x * s, w)``, likewise: the reference
    dense:  ``F.conv2d(x, w)``, without switches
    naive:  ``F.conv2d(x.index_select(1, on), w.index_select(1, on))``: no gradient for switches that are off, nor on
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
from benches.timers import Spread, Timed, clock, interleave
from benches.training.cells import LayerCell

PEERS = ("masked", "dense", "naive", "auto")
CPU = torch.device("cpu")
MIN_ROUNDS, MAX_ROUNDS = 5, 30
# Inputs and output gradients must not be correlated.
GRADIENT_SEED = 1

Forward = Callable[[Tensor], Tensor]


@dataclass
class Peer(Timed):
    """A convolution that is differentiated in each run.

    Args:
        forward: The convolution.
        leaves: What it is differentiated in beside the input, by name.
        gradients: Pool of output gradients, rotated through.
        forward_s: Seconds of every forward.
        backward_s: Seconds of every backward.
    """

    forward: Forward = F.relu
    leaves: dict[str, Tensor] = field(default_factory=dict)
    gradients: Sequence[Tensor] = ()
    forward_s: list[float] = field(default_factory=list)
    backward_s: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        turn = count()
        self.run = lambda x: self.differentiate(x, self.gradients[next(turn) % len(self.gradients)])

    def differentiate(self, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
        """Return the result and the gradients, by name."""
        start = time.perf_counter()
        y = self.forward(x)
        middle = time.perf_counter()
        found = torch.autograd.grad(y, [x, *self.leaves.values()], grad)
        self.forward_s.append(middle - start)
        self.backward_s.append(time.perf_counter() - middle)
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

    def peer(self, name: str, mode: str) -> Peer:
        """Prepare a peer.

        Raises:
            ValueError: If the name is none of `PEERS`.
        """
        problem = self.problem
        stride, padding = problem.conv_args
        weight = problem.weight.detach().requires_grad_(mode == "trained")
        switch = self.switch.detach().requires_grad_()
        index = problem.in_index
        leaves = {"weight": weight} if weight.requires_grad else {}
        enter = Timed.enter
        if name == "auto":
            op, use = ours.package().switched_conv2d, ours.package().use_backend
            forward: Forward = lambda x: op(x, weight, None, switch, stride, padding)  # noqa: E731
            enter = lambda: use("auto")  # noqa: E731
        elif name == "masked":
            forward = lambda x: F.conv2d(x * switch.view(1, -1, 1, 1), weight, None, stride, padding)  # noqa: E731
        elif name == "dense":
            forward = lambda x: F.conv2d(x, weight, None, stride, padding)  # noqa: E731
        elif name == "naive":
            forward = lambda x: F.conv2d(  # noqa: E731
                x.index_select(1, index), weight.index_select(1, index), None, stride, padding
            )
        else:
            raise ValueError(f"peer(): expected `name` to be one of {', '.join(PEERS)}, got {name!r}.")
        if name in ("auto", "masked"):
            leaves = {**leaves, "switch": switch}
        return Peer(forward, problem.inputs, enter, forward=forward, leaves=leaves, gradients=self.gradients)


class LayerBench:
    """Measures cells one after the other.

    Args:
        peaks: Whether peaks of memory are measured, in a process of their own.
    """

    def __init__(self, peaks: bool = True) -> None:
        self.inputs = NumberStore(torch.float32, CPU)
        self.grads = NumberStore(torch.float32, CPU, GRADIENT_SEED)
        self.clock = clock(CPU)
        self.peaks = peaks and memory.can_measure_peak()
        self._worker: ProcessPoolExecutor | None = None
        # Both modes of a case follow one another.
        self.layer = lru_cache(maxsize=1)(self._layer)
        self._reference = lru_cache(maxsize=2)(lambda cell, masked: self.layer(cell).reference(masked))
        self._dense_errors: dict[str, float] = {}

    def _layer(self, cell: Cell) -> Layer:
        problem = Problem.make(cell, self.inputs, torch.float32, CPU)
        problem.inputs = [x.detach().requires_grad_() for x in problem.inputs]
        shape = (cell.batch, cell.case.C_out, *cell.case.output_size)
        switch = torch.zeros(cell.case.C_in)
        switch[problem.in_index.long()] = 1
        return Layer(problem, self.grads.pool(shape, cell.layout)[0], switch)

    def gated(self, name: str, peer: Peer, cell: LayerCell) -> float:
        """Check the result and every gradient of a peer, and return the largest error as a share of the largest value.

        Raises:
            WrongResultError: If one is wrong, or ours are in another memory format than the input.
        """
        # The dense convolution is the same at all densities.
        key = replace(cell, cell=replace(cell.cell, density=1.0)).id
        if name == "dense" and key in self._dense_errors:
            return self._dense_errors[key]
        layer = self.layer(cell.cell)
        reference, lengths = self._reference(cell.cell, name != "dense"), layer.lengths()
        peer.enter()
        found = peer.differentiate(layer.problem.inputs[0], layer.gradients[0])
        largest = 0.0
        for what, value in found.items():
            where = f"{name} ({what}) on {cell.id}"
            if name == "auto" and value.dim() == 4:
                gate.check_layout(where, value, cell.cell.layout)
            error = gate.check(where, value, reference[what], lengths[what])
            largest = max(largest, error / reference[what].abs().max().item())
        if name == "dense":
            self._dense_errors[key] = largest
        return largest

    def _peak(self, cell: LayerCell, name: str) -> int | None:
        if not self.peaks:
            return None
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
        """
        start = time.perf_counter()
        layer = self.layer(cell.cell)
        peers = {name: layer.peer(name, cell.mode) for name in names}
        errors = {name: self.gated(name, peer, cell) for name, peer in peers.items()}
        saved, peaks = {}, {}
        for name, peer in peers.items():
            run = partial(peer.forward, layer.problem.inputs[0])
            saved[name] = memory.saved_bytes(run, [layer.problem.weight, layer.switch])
            peaks[name] = self._peak(cell, name)
            peer.forward_s.clear()
            peer.backward_s.clear()
        left = seconds - (time.perf_counter() - start)
        samples = interleave(peers, self.clock, left, MIN_ROUNDS, MAX_ROUNDS)
        return with_ratios(
            _row(cell, layer, name, peer, Spread.of(samples[name]), errors[name], saved[name], peaks[name])
            for name, peer in peers.items()
        )


def layer_peak(cell: LayerCell, name: str) -> int:
    """Peak of one forward with backward, after one that leaves what a kernel keeps between calls."""
    bench = _worker_bench()
    layer = bench.layer(cell.cell)
    peer = layer.peer(name, cell.mode)
    peer.enter()
    peer.run(peer.inputs[0])
    return memory.peak_bytes(lambda: peer.run(peer.inputs[0]))


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
    cell: LayerCell, layer: Layer, name: str, peer: Peer, spread: Spread, error: float, saved: int, peak: int | None
) -> Row:
    problem = layer.problem
    return row_of(
        cell.cell,
        spread,
        useful_flop(cell, problem, dense=name == "dense"),
        cell=cell.id,
        **cell.cell.facts,
        peer=name,
        inputs="rotated" if problem.rotated else "warm",
        max_error=error,
        mode=cell.mode,
        forward_s=median(peer.forward_s),
        backward_s=median(peer.backward_s),
        saved_bytes=saved,
        peak_bytes=peak,
    )
