"""Whole steps of training: ResNet-26 on photographs, one domain, switches in every convolution but the stem.

Variants, all with batch norm and classifier trained, and the convolutions' weights frozen or trained:
    auto:   the plain network converted by the package's own `switch_`
    masked: the same network with ``F.conv2d(x * s, w)`` in place of each convolution: the reference
    dense:  the plain network, without switches
    naive:  ``F.conv2d(x.index_select(1, on), w.index_select(1, on))`` in place of each convolution: no gradient for
            switches that are off, nor on, so that it trains none; every other gradient is that of the masked network
A step is forward, loss, backward, and SGD with momentum over everything that is trained. Scores lie so far from the
threshold that no switch turns while it is timed. Beside ``auto``, a backend of the package can be named, such as
``triton``.
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
from benches.timers import Marks, Spread, Timed, clock, interleave
from benches.training.backends import gated
from benches.training.cells import STEP, StepCell
from benches.training.step_baselines import SIZE, THRESHOLD, freeze, network, plain, scores, trained

BASELINES = ("masked", "dense", "naive", "auto")
# Variants without gradients of switches.
NOT_SWITCHING = ("dense", "naive")
CPU = torch.device("cpu")
RATE, MOMENTUM = 1e-4, 0.9
MIN_ROUNDS, MAX_ROUNDS = {"cpu": 3, "cuda": 30}, {"cpu": 20, "cuda": 100}
# Images of the gate's float64 step.
GATED_IMAGES = 4
# Norm of a gradient's difference over its norm: rounding, and the few ReLU that it flips, through 26 layers. The
# largest that was seen of a right one is 1.6e-2.
TOLERANCE = 3e-2


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
        marks: Around forward (with the loss), backward and optimiser, one entry a step.
    """

    model: nn.Module = field(default_factory=nn.Identity)
    labels: Tensor = field(default_factory=lambda: torch.empty(0))
    marks: list[Marks] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimiser = torch.optim.SGD([p for _, p in trained(self.model)], lr=RATE, momentum=MOMENTUM)
        self.run = self.step

    def loss(self, x: Tensor) -> Tensor:
        """Forward and loss."""
        return F.cross_entropy(self.model(x), self.labels)

    def step(self, x: Tensor) -> float:
        """One step; returns the loss."""
        marks = Marks(x.device)
        marks.mark()
        loss = self.loss(x)
        marks.mark()
        loss.backward()
        marks.mark()
        self.optimiser.step()
        self.optimiser.zero_grad()
        marks.mark()
        self.marks.append(marks)
        return loss.item()


class StepBench:
    """Measures cells one after the other.

    Args:
        peaks: Whether peaks of memory are measured: on the CPU each in a process of its own.
        device: Where to measure.
    """

    def __init__(self, peaks: bool = True, device: torch.device = CPU) -> None:
        self.device = device
        self.clock = clock(device)
        self.peaks = peaks and (device.type == "cuda" or memory.can_measure_peak())
        # Why named backends lack cells.
        self.left_out: list[str] = []
        # The plain network's peak does not depend on the density.
        self._dense_peak = lru_cache(lambda cell: self._peak_of(cell, "dense"))

    def model(self, cell: StepCell, name: str) -> nn.Module:
        """Build one variant's network.

        Raises:
            ValueError: If the name is none of `BASELINES`, nor a backend's.
        """
        known = tuple(dict.fromkeys((*BASELINES, *ours.BACKENDS)))
        if name not in known:
            raise ValueError(f"model(): expected `name` to be one of {', '.join(known)}, got {name!r}.")
        made = network(name, scores(plain(), cell.density, cell.seed))
        made = made.to(self.device).to(memory_format=MEMORY_FORMATS[cell.layout])
        if cell.mode == "frozen":
            freeze(made)
        return made.train()

    def data(self, cell: StepCell) -> tuple[list[Tensor], Tensor]:
        """Return a few batches of photographs, and labels for each of them."""
        memory_format = MEMORY_FORMATS[cell.layout]
        inputs = [x.to(self.device).contiguous(memory_format=memory_format) for x in batches(SIZE, cell.batch)]
        labels = torch.randint(0, CLASSES, (cell.batch,), generator=torch.Generator().manual_seed(cell.seed))
        return inputs, labels.to(self.device)

    def prepare(self, cell: StepCell, name: str) -> Step:
        """Build one variant with its data."""
        inputs, labels = self.data(cell)
        use_backend = ours.package().use_backend if name in ours.BACKENDS else None
        enter = (lambda: use_backend(name)) if use_backend else Timed.enter
        return Step(F.relu, inputs, enter, model=self.model(cell, name), labels=labels)

    def reference(self, cell: StepCell) -> dict[str, Tensor]:
        """Gradients of the masked network in float64, for a few images."""
        inputs, labels = self.data(cell)
        x = inputs[0][:GATED_IMAGES].double()
        return gradients(self.model(cell, "masked").double(), x, labels[:GATED_IMAGES])

    def gated(self, name: str, step: Step, cell: StepCell, reference: dict[str, Tensor]) -> float:
        """Compare the gradients of the first images with the reference, and return the largest error.

        Those of switches are left out where a variant trains none.

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
            NotImplementedError: If the package cannot run it.
        """
        start = time.perf_counter()
        steps = {name: self.prepare(cell, name) for name in names}
        reference = self.reference(cell) if set(names) != {"dense"} else {}
        whole = self._of_whole_batch(steps["masked"]) if "masked" in names else {}

        def check(name: str) -> float:
            if name == "dense":
                return 0.0
            error = self.gated(name, steps[name], cell, reference)
            if whole and name != "masked":
                found = self._of_whole_batch(steps[name])
                within(f"{name} on {cell.id}, whole batch", found, computed(name, whole))
            return error

        errors = gated(names, check, self.left_out, BASELINES)
        names = list(errors)
        steps = {name: steps[name] for name in names}
        whole.clear()
        saved = {}
        for name, step in steps.items():
            step.enter()
            apart = [*step.model.parameters(), *step.model.buffers(), *step.inputs, step.labels]
            saved[name] = memory.saved_bytes(partial(step.loss, step.inputs[0]), apart)
        peaks = {name: self._peak(cell, name) for name in names}
        left = seconds - (time.perf_counter() - start)
        kind = self.device.type
        samples = interleave(steps, self.clock, left, MIN_ROUNDS[kind], MAX_ROUNDS[kind])
        for name in names:
            check_density(name, steps[name].model, cell)
        kept = in_lists(plain(), cell.density, cell.seed)
        flop = conv_flop(copy.deepcopy(plain()), steps[names[0]].inputs[0][:1].cpu().contiguous(), kept)
        return with_ratios(
            _row(cell, name, steps[name], Spread.of(samples[name]), errors[name], saved[name], peaks[name], flop)
            for name in names
        )

    @staticmethod
    def _of_whole_batch(step: Step) -> dict[str, Tensor]:
        step.enter()
        return gradients(step.model, step.inputs[0], step.labels)

    def _peak(self, cell: StepCell, name: str) -> int | None:
        if not self.peaks:
            return None
        if name == "dense":
            return self._dense_peak(StepCell(cell.batch, 1.0, cell.layout, cell.mode))
        return self._peak_of(cell, name)

    def _peak_of(self, cell: StepCell, name: str) -> int:
        if self.device.type == "cpu":
            return memory.in_fresh_process(step_peak, cell, name)
        # The first step of these sizes chooses algorithms, with scratch memory of its own.
        first = self.prepare(cell, name)
        first.enter()
        first.step(first.inputs[0])
        del first
        step = self.prepare(cell, name)
        return memory.cuda_peak_bytes(lambda: [step.step(x) for x in step.inputs[:2]])


def computed(name: str, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those gradients that a variant computes: all, or all but the switches'."""
    if name not in NOT_SWITCHING:
        return wanted
    return {where: value for where, value in wanted.items() if not where.endswith(".score")}


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
        wanted = given.get(where.removesuffix(".score")) if where.endswith(".score") else None
        if wanted is not None and not torch.equal(score.cpu() > THRESHOLD, wanted > 0):
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
    taken = [marks.seconds() for marks in step.marks]
    forward, backward, optimiser = (median(part) for part in zip(*taken, strict=True))
    return row_of(
        cell,
        spread,
        useful_flop(cell, flop[0], flop[0 if name == "dense" else 1]),
        network="resnet26",
        case=STEP,
        variant=name,
        device=step.inputs[0].device.type,
        max_error=error,
        mode=cell.mode,
        forward_s=forward,
        backward_s=backward,
        optimiser_s=optimiser,
        saved_bytes=saved,
        peak_bytes=peak,
    )
