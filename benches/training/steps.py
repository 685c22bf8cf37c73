"""Whole steps of training: ResNet-26 on photographs, one domain, switches in every convolution but the stem.

Peers, all with batch norm and classifier trained, and the convolutions' weights frozen or trained:
    auto:   the plain network converted by the package's own `switch_`
    masked: the same network with ``F.conv2d(x * s, w)`` in place of each convolution: the reference
    dense:  the plain network, without switches
A step is forward, loss, backward, and SGD with momentum over everything that is trained. Scores lie so far from the
threshold that no switch turns while it is timed.
"""

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benches import gate, memory, ours
from benches.networks import CLASSES, CROPS, NETWORKS, conv_flop, in_lists
from benches.photographs import batches
from benches.problem import MEMORY_FORMATS
from benches.rows import Row, row_of, with_ratios
from benches.timers import Spread, Timed, clock, interleave
from benches.training.cells import STEP, StepCell

PEERS = ("masked", "dense", "auto")
DOMAIN = "photographs"
SIZE = NETWORKS["resnet26"][1]
STEM = "conv1"
THRESHOLD = 5e-3
ON, OFF = 1.0, -1.0
RATE, MOMENTUM = 1e-4, 0.9
MIN_ROUNDS, MAX_ROUNDS = 3, 20
# Images of the gate's float64 step.
GATED_IMAGES = 4
# Norm of a gradient's difference over its norm: rounding, and the few ReLU that it flips, through 26 layers.
TOLERANCE = 2e-2


class MaskedSwitchConv2d(nn.Module):
    """A convolution of x times binary switches, trained by the straight-through estimator: plain autograd."""

    def __init__(self, conv: nn.Conv2d, score: Tensor) -> None:
        super().__init__()
        self.weight = conv.weight
        self.score = nn.Parameter(score.clone())
        self.stride, self.padding = conv.stride, conv.padding

    def forward(self, x: Tensor) -> Tensor:
        """Multiply and convolve."""
        binary = (self.score > THRESHOLD).to(x.dtype)
        switch = binary + self.score - self.score.detach()
        return F.conv2d(x * switch.view(1, -1, 1, 1), self.weight, None, self.stride, self.padding)


@lru_cache(maxsize=1)
def plain() -> nn.Module:
    """Return the plain network with random weights, in training mode, nchw."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = NETWORKS["resnet26"][0]().train()
        # Statistics of the photographs, from which batch norms go on.
        model(batches(SIZE, CROPS, count=1)[0])
    return model


def scores(model: nn.Module, density: float, seed: int) -> dict[str, Tensor]:
    """Draw scores for every convolution that gets switches; exactly density x channels of each are on."""
    found = {}
    for name, index in in_lists(model, density, seed).items():
        conv: Any = model.get_submodule(name)
        found[name] = torch.full((conv.in_channels,), OFF)
        found[name][index.long()] = ON
    return found


def switched(model: nn.Module, given: dict[str, Tensor]) -> nn.Module:
    """Convert a copy of a plain network through the package, with these scores."""
    bk = ours.package()
    made = bk.nn.switch_(copy.deepcopy(model), [DOMAIN], lambda module, name: name != STEM, threshold=THRESHOLD)
    bk.set_domain(made, DOMAIN)
    with torch.no_grad():
        for name, score in given.items():
            made.get_submodule(name).domains[DOMAIN].score.copy_(score)
    return made


def masked(model: nn.Module, given: dict[str, Tensor]) -> nn.Module:
    """Convert a copy of a plain network to masked convolutions with these scores."""
    made = copy.deepcopy(model)
    for name, score in given.items():
        parent, _, child = name.rpartition(".")
        owner = made.get_submodule(parent)
        setattr(owner, child, MaskedSwitchConv2d(getattr(owner, child), score))
    return made


def freeze(model: nn.Module) -> None:
    """Take all convolution weights out of training."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, MaskedSwitchConv2d)):
            module.weight.requires_grad_(False)


def trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters that are trained, under names that all peers share."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name.replace(f"domains.{DOMAIN}.", ""), parameter


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
        given = scores(plain(), cell.density, cell.seed)
        if name not in PEERS:
            raise ValueError(f"model(): expected `name` to be one of {', '.join(PEERS)}, got {name!r}.")
        build = {"masked": masked, "auto": switched}
        made: Any = copy.deepcopy(plain()) if name == "dense" else build[name](plain(), given)
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

        Raises:
            WrongResultError: If a gradient differs by more than rounding.
        """
        step.enter()
        few = step.inputs[0][:GATED_IMAGES]
        found = gradients(copy.deepcopy(step.model), few, step.labels[:GATED_IMAGES])
        return within(f"{name} on {cell.id}", found, reference)

    def rows(self, cell: StepCell, names: Sequence[str], seconds: float) -> list[Row]:
        """Measure one cell in about some seconds; at least three rounds are made.

        The dense network is not gated, as it computes something else. Of the whole batch, the package's gradients are
        compared with those of the masked network.

        Raises:
            WrongResultError: If a gradient is wrong, or switches have turned while they were timed.
        """
        start = time.perf_counter()
        steps = {name: self.prepare(cell, name) for name in names}
        errors = dict.fromkeys(names, 0.0)
        if compared := [name for name in names if name != "dense"]:
            reference = self.reference(cell)
            errors |= {name: self.gated(name, steps[name], cell, reference) for name in compared}
        saved = {}
        for name, step in steps.items():
            step.enter()
            apart = [*step.model.parameters(), *step.model.buffers(), *step.inputs, step.labels]
            saved[name] = memory.saved_bytes(partial(step.loss, step.inputs[0]), apart)
        if {"masked", "auto"} <= set(names):
            whole = [gradients(steps[n].model, steps[n].inputs[0], steps[n].labels) for n in ("auto", "masked")]
            within(f"auto on {cell.id}, whole batch", *whole)
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
