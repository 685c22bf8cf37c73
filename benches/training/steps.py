"""Whole steps of training: ResNet-26 on photographs, one domain, switches in every convolution but the stem.

Peers, all with batch norm and classifier trained, and the convolutions' weights frozen or trained:
    auto:   the plain network converted by the package's own `switch_`
    masked: the same network with ``F.conv2d(x * s, w)`` in place of each convolution: the reference
    dense:  the plain network, without switches
    naive:  ``F.conv2d(x.index_select(1, on), w.index_select(1, on))`` in place of each convolution: no gradient for
            switches that are off, nor on, so that it trains none; every other gradient is that of the masked network
A step is forward, loss, backward, and SGD with momentum over everything that is trained. Scores lie so far from the
threshold that no switch turns while it is timed.
"""

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benches import gate, memory, ours
from benches.networks import CLASSES, conv_flop, in_lists
from benches.photographs import batches
from benches.problem import MEMORY_FORMATS
from benches.rows import Row, row_of, with_ratios
from benches.timers import Spread, Timed, clock, interleave
from benches.training.cells import STEP, StepCell
from benches.training.step_peers import SIZE, THRESHOLD, freeze, network, plain, scores, trained

PEERS = ("masked", "dense", "naive", "auto")
# Peers that train switches.
SWITCHING = ("masked", "auto")
RATE, MOMENTUM = 1e-4, 0.9
MIN_ROUNDS, MAX_ROUNDS = 3, 20
# Images of the gate's float64 step.
GATED_IMAGES = 4
# Norm of a gradient's difference over its norm: rounding, and the few ReLU that it flips, through 26 layers.
TOLERANCE = 2e-2


def gradients(model: nn.Module, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Gradients of one step, by shared name; the model's running statistics are updated."""
    named = dict(trained(model))
    loss = F.cross_entropy(model(x), labels)
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def largest_difference(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> tuple[float, str]:
    """Largest norm of a difference over the norm of what is wanted, and of which gradient.

    Raises:
        WrongResultError: If the names differ.
    """
    if set(found) != set(wanted):
        odd = sorted(set(found) ^ set(wanted))
        raise gate.WrongResultError(f"largest_difference(): expected gradients of the same parameters, got {odd}.")
    return max(
        (((found[name].double() - wanted[name].double()).norm() / wanted[name].double().norm()).item(), name)
        for name in wanted
    )


@dataclass
class Step(Timed):
    """A network with its optimiser; each run is one step.

    Args:
        model: In training mode.
        labels: Of every batch.
        seconds: Of forward (with the loss), backward and optimiser, one entry a step.
    """

    model: nn.Module = field(default_factory=nn.Identity)
    labels: Tensor = field(default_factory=lambda: torch.empty(0))
    seconds: list[tuple[float, float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimiser = torch.optim.SGD([p for _, p in trained(self.model)], lr=RATE, momentum=MOMENTUM)
        self.run = self.step

    def loss(self, x: Tensor) -> Tensor:
        """Forward and loss."""
        return F.cross_entropy(self.model(x), self.labels)

    def step(self, x: Tensor) -> float:
        """One step; returns the loss."""
        start = time.perf_counter()
        loss = self.loss(x)
        forward = time.perf_counter()
        loss.backward()
        backward = time.perf_counter()
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.seconds.append((forward - start, backward - forward, time.perf_counter() - backward))
        return loss.item()


class StepBench:
    """Measures cells one after the other.

    Args:
        peaks: Whether peaks of memory are measured, each in a process of its own.
    """

    def __init__(self, peaks: bool = True) -> None:
        self.clock = clock(torch.device("cpu"))
        self.peaks = peaks and memory.can_measure_peak()
        # The plain network's peak does not depend on the density.
        self._dense_peak = lru_cache(lambda cell: memory.in_fresh_process(step_peak, cell, "dense"))

    def model(self, cell: StepCell, name: str) -> nn.Module:
        """Build one peer's network.

        Raises:
            ValueError: If the name is none of `PEERS`.
        """
        if name not in PEERS:
            raise ValueError(f"model(): expected `name` to be one of {', '.join(PEERS)}, got {name!r}.")
        made = network(name, scores(plain(), cell.density, cell.seed))
        made = made.to(memory_format=MEMORY_FORMATS[cell.layout])
        if cell.mode == "frozen":
            freeze(made)
        return made.train()

    def data(self, cell: StepCell) -> tuple[list[Tensor], Tensor]:
        """Return a few batches of photographs, and labels for each of them."""
        memory_format = MEMORY_FORMATS[cell.layout]
        inputs = [x.contiguous(memory_format=memory_format) for x in batches(SIZE, cell.batch)]
        return inputs, torch.randint(0, CLASSES, (cell.batch,), generator=torch.Generator().manual_seed(cell.seed))

    def prepare(self, cell: StepCell, name: str) -> Step:
        """Build one peer with its data."""
        inputs, labels = self.data(cell)
        use_backend = ours.package().use_backend if name == "auto" else None
        enter = (lambda: use_backend("auto")) if use_backend else Timed.enter
        return Step(F.relu, inputs, enter, model=self.model(cell, name), labels=labels)

    def reference(self, cell: StepCell) -> dict[str, Tensor]:
        """Gradients of the masked network in float64, for a few images."""
        inputs, labels = self.data(cell)
        x = inputs[0][:GATED_IMAGES].double()
        return gradients(self.model(cell, "masked").double(), x, labels[:GATED_IMAGES])

    def gated(self, name: str, step: Step, cell: StepCell, reference: dict[str, Tensor]) -> float:
        """Compare the gradients of the first images with the reference, and return the largest error.

        Those of switches are left out where a peer trains none.

        Raises:
            WrongResultError: If a gradient differs by more than rounding.
        """
        step.enter()
        few = step.inputs[0][:GATED_IMAGES]
        found = gradients(copy.deepcopy(step.model), few, step.labels[:GATED_IMAGES])
        return within(f"{name} on {cell.id}", found, computed(name, reference))

    def rows(self, cell: StepCell, names: Sequence[str], seconds: float) -> list[Row]:
        """Measure one cell in about some seconds; at least three rounds are made.

        The dense network is not gated, as it computes something else. Of the whole batch, gradients are compared with
        those of the masked network.

        Raises:
            WrongResultError: If a gradient is wrong, or switches have turned while they were timed.
        """
        start = time.perf_counter()
        steps = {name: self.prepare(cell, name) for name in names}
        errors = dict.fromkeys(names, 0.0)
        compared = [name for name in names if name != "dense"]
        if compared:
            reference = self.reference(cell)
            errors |= {name: self.gated(name, steps[name], cell, reference) for name in compared}
        saved = {}
        for name, step in steps.items():
            step.enter()
            apart = [*step.model.parameters(), *step.model.buffers(), *step.inputs, step.labels]
            saved[name] = memory.saved_bytes(partial(step.loss, step.inputs[0]), apart)
        if "masked" in names:
            whole = {name: gradients(steps[name].model, steps[name].inputs[0], steps[name].labels) for name in compared}
            for name in compared:
                within(f"{name} on {cell.id}, whole batch", whole[name], computed(name, whole["masked"]))
        peaks = {name: self._peak(cell, name) for name in names}
        left = seconds - (time.perf_counter() - start)
        samples = interleave(steps, self.clock, left, MIN_ROUNDS, MAX_ROUNDS)
        for name in compared:
            check_density(name, steps[name].model, cell)
        kept = in_lists(plain(), cell.density, cell.seed)
        flop = conv_flop(copy.deepcopy(plain()), steps[names[0]].inputs[0][:1].contiguous(), kept)
        return with_ratios(
            _row(cell, name, steps[name], Spread.of(samples[name]), errors[name], saved[name], peaks[name], flop)
            for name in names
        )

    def _peak(self, cell: StepCell, name: str) -> int | None:
        if not self.peaks:
            return None
        if name == "dense":
            return self._dense_peak(StepCell(cell.batch, 1.0, cell.layout, cell.mode))
        return memory.in_fresh_process(step_peak, cell, name)


def computed(name: str, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those gradients that a peer computes: all, or all but the switches'."""
    return {where: value for where, value in wanted.items() if name in SWITCHING or not where.endswith(".score")}


def within(name: str, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Return the largest difference of two sets of gradients.

    Raises:
        WrongResultError: If it is more than rounding explains.
    """
    error, where = largest_difference(found, wanted)
    if not error <= TOLERANCE:
        raise gate.WrongResultError(
            f"within(): expected gradients of {name} to be within {TOLERANCE:.3g} of their norm, got {error:.3g} "
            f"for {where}."
        )
    return error


def check_density(name: str, model: nn.Module, cell: StepCell) -> None:
    """Raise if the switches are no longer those of the cell.

    Raises:
        WrongResultError: If a switch has turned.
    """
    given = scores(plain(), cell.density, cell.seed)
    for where, score in trained(model):
        if where.endswith(".score") and not torch.equal(score > THRESHOLD, given[where.removesuffix(".score")] > 0):
            raise gate.WrongResultError(f"check_density(): expected `model` to keep its switches, got {name}: {where}.")


def step_peak(cell: StepCell, name: str) -> int:
    """Peak of two steps from the first on, in a fresh process."""
    step = StepBench(peaks=False).prepare(cell, name)
    step.enter()
    return memory.peak_bytes(lambda: [step.step(x) for x in step.inputs[:2]])


def useful_flop(cell: StepCell, full: float, kept: float) -> float:
    """FLOP of all convolutions of a step, as in a single layer; the first one's input needs no gradient."""
    return cell.batch * (full + kept * (2 if cell.mode == "trained" else 1))


def _row(
    cell: StepCell,
    name: str,
    step: Step,
    spread: Spread,
    error: float,
    saved: int,
    peak: int | None,
    flop: tuple[float, float],
) -> Row:
    forward, backward, optimiser = (median(part) for part in zip(*step.seconds, strict=True))
    return row_of(
        cell,
        spread,
        useful_flop(cell, flop[0], flop[0 if name == "dense" else 1]),
        network="resnet26",
        case=STEP,
        peer=name,
        max_error=error,
        mode=cell.mode,
        forward_s=forward,
        backward_s=backward,
        optimiser_s=optimiser,
        saved_bytes=saved,
        peak_bytes=peak,
    )
