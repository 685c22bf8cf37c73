"""Whole training steps: ResNet-26 on photographs, one domain, switches in every convolution but the stem.

Variants, all with trained batch norm and classifier, and with frozen or trained convolution weights:
    auto:   the plain network converted by the package's `switch_`
    masked: the same network with ``F.conv2d(x * s, w)`` for each convolution; the reference
    dense:  the plain network, without switches
    naive:  ``F.conv2d(x.index_select(1, on), w.index_select(1, on))`` for each convolution, without gradients of
            switches; every other gradient equals that of the masked network
A step is forward, loss, backward, and SGD with momentum over all trained parameters. Scores lie so far from the
threshold that no switch flips during the timing. Backends of the package, such as ``triton``, can be added by name.
"""

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benches import gate, memory, ours
from benches.network_models import CLASSES, conv_flop, in_lists
from benches.photographs import batches
from benches.problem import MEMORY_FORMATS
from benches.rows import Row, row_of, with_ratios
from benches.timers import Marks, Spread, Timed
from benches.training.bench import CPU, TrainingBench, passing, phases
from benches.training.cells import STEP, StepCell
from benches.training.step_baselines import SIZE, THRESHOLD, freeze, network, plain, scores, trained

VARIANTS = ("masked", "dense", "naive", "auto")
# Variants without gradients of switches.
WITHOUT_SWITCHES = ("dense", "naive")
RATE, MOMENTUM = 1e-4, 0.9
# Images of the float64 reference.
REFERENCE_IMAGES = 4
# Norm of a gradient's difference over its norm, by rounding (which also flips a few ReLUs) in 26 layers. The largest
# measured for a correct gradient is 1.6e-2.
TOLERANCE = 3e-2


def gradients(model: nn.Module, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Gradients of one step by shared name; updates running statistics."""
    named = dict(trained(model))
    loss = F.cross_entropy(model(x), labels)
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def largest_difference(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """Return the largest difference relative to the norm of a gradient, and the name of that gradient.

    Raises:
        WrongResultError: If the names differ.
    """
    if unmatched := sorted(set(gradients) ^ set(expected)):
        raise gate.WrongResultError(
            f"largest_difference(): expected gradients of the same parameters, got {unmatched} on one side only."
        )
    exact = {name: gradient.double() for name, gradient in expected.items()}
    errors = [((gradients[name].double() - y).norm().item() / y.norm().item(), name) for name, y in exact.items()]
    return max(errors, key=lambda error: math.inf if math.isnan(error[0]) else error[0])


@dataclass
class Step(Timed):
    """A network with its optimiser; each run is one step.

    Args:
        model: In training mode.
        labels: Of every batch.
        marks: Time stamps of forward (with loss), backward and optimiser of every step.
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
        """Run one step; return the loss."""
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


class StepBench(TrainingBench):
    """Measures whole steps; peak memory on the CPU in a new process each."""

    min_rounds = {"cpu": 3, "cuda": 30}  # noqa: RUF012
    max_rounds = {"cpu": 20, "cuda": 100}  # noqa: RUF012

    def __init__(self, peaks: bool = True, device: torch.device = CPU) -> None:
        super().__init__(peaks, device)
        # Does not depend on the density.
        self._dense_peak = lru_cache(lambda cell: self._peak_of(cell, "dense"))

    def model(self, cell: StepCell, name: str) -> nn.Module:
        """Build the network of a variant.

        Raises:
            ValueError: If the name is neither in `VARIANTS` nor a backend.
        """
        known = tuple(dict.fromkeys((*VARIANTS, *ours.BACKENDS)))
        if name not in known:
            raise ValueError(f"model(): expected `name` to be one of {', '.join(known)}, got {name!r}.")
        model = network(name, scores(plain(), cell.density, cell.seed))
        model = model.to(self.device).to(memory_format=MEMORY_FORMATS[cell.layout])
        if cell.mode == "frozen":
            freeze(model)
        return model.train()

    def data(self, cell: StepCell) -> tuple[list[Tensor], Tensor]:
        """Return a pool of batches of photographs, and the labels of every batch."""
        memory_format = MEMORY_FORMATS[cell.layout]
        inputs = [x.to(self.device).contiguous(memory_format=memory_format) for x in batches(SIZE, cell.batch)]
        labels = torch.randint(0, CLASSES, (cell.batch,), generator=torch.Generator().manual_seed(cell.seed))
        return inputs, labels.to(self.device)

    def prepare(self, cell: StepCell, name: str) -> Step:
        """Build a variant with its data."""
        inputs, labels = self.data(cell)
        enter = partial(ours.package().use_backend, name) if name in ours.BACKENDS else Timed.enter
        return Step(F.relu, inputs, enter, model=self.model(cell, name), labels=labels)

    def reference(self, cell: StepCell) -> dict[str, Tensor]:
        """Return float64 gradients of the masked network for a few images."""
        inputs, labels = self.data(cell)
        x = inputs[0][:REFERENCE_IMAGES].double()
        return gradients(self.model(cell, "masked").double(), x, labels[:REFERENCE_IMAGES])

    def check(self, name: str, step: Step, cell: StepCell, reference: dict[str, Tensor]) -> float:
        """Compare the gradients of the first images with the reference; return the largest error.

        Raises:
            WrongResultError: If a gradient differs by more than rounding.
        """
        step.enter()
        few = step.inputs[0][:REFERENCE_IMAGES]
        result = gradients(copy.deepcopy(step.model), few, step.labels[:REFERENCE_IMAGES])
        return within(f"{name} on {cell.id}", result, computed(name, reference))

    def rows(self, cell: StepCell, names: Sequence[str], seconds: float) -> list[Row]:
        """Measure one cell in about ``seconds``, in at least three rounds.

        The dense network computes another function and is not checked. Gradients of the whole batch are compared with
        those of the masked network.

        Raises:
            WrongResultError: If a gradient is wrong, or switches flipped during the timing.
            NotImplementedError: If the package cannot run the cell.
        """
        start = time.perf_counter()
        steps = {name: self.prepare(cell, name) for name in names}
        reference = self.reference(cell) if set(names) != {"dense"} else {}
        whole_batch = self._whole_batch_gradients(steps["masked"]) if "masked" in names else {}

        def check(name: str) -> float:
            if name == "dense":
                return 0.0
            error = self.check(name, steps[name], cell, reference)
            if whole_batch and name != "masked":
                result = self._whole_batch_gradients(steps[name])
                within(f"{name} on {cell.id}, whole batch", result, computed(name, whole_batch))
            return error

        errors = passing(names, check, self.skipped, VARIANTS)
        steps = {name: steps[name] for name in errors}
        whole_batch.clear()
        saved = {}
        for name, step in steps.items():
            step.enter()
            excluded = [*step.model.parameters(), *step.model.buffers(), *step.inputs, step.labels]
            saved[name] = memory.saved_bytes(partial(step.loss, step.inputs[0]), excluded)
        peaks = {name: self._peak(cell, name) for name in steps}
        samples = self.samples(steps, seconds - (time.perf_counter() - start))
        for name, step in steps.items():
            check_density(name, step.model, cell)
        lists = in_lists(plain(), cell.density, cell.seed)
        image = next(iter(steps.values())).inputs[0][:1].cpu().contiguous()
        full, kept = conv_flop(copy.deepcopy(plain()), image, lists)
        return with_ratios(
            row_of(
                cell,
                Spread.of(samples[name]),
                useful_flop(cell, full, full if name == "dense" else kept),
                network="resnet26",
                case=STEP,
                variant=name,
                device=self.device.type,
                max_error=errors[name],
                mode=cell.mode,
                saved_bytes=saved[name],
                peak_bytes=peaks[name],
                **phases(step.marks),
            )
            for name, step in steps.items()
        )

    @staticmethod
    def _whole_batch_gradients(step: Step) -> dict[str, Tensor]:
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
        # The first step chooses algorithms, which takes extra scratch memory.
        first = self.prepare(cell, name)
        first.enter()
        first.step(first.inputs[0])
        del first
        step = self.prepare(cell, name)
        return memory.cuda_peak_bytes(lambda: [step.step(x) for x in step.inputs[:2]])


def computed(name: str, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradients that a variant computes: all, or all but those of switches."""
    if name not in WITHOUT_SWITCHES:
        return expected
    return {parameter: value for parameter, value in expected.items() if not parameter.endswith(".score")}


def within(name: str, gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the largest relative difference of two sets of gradients.

    Raises:
        WrongResultError: If it exceeds the tolerance.
    """
    error, parameter = largest_difference(gradients, expected)
    if not error <= TOLERANCE:
        raise gate.WrongResultError(
            f"within(): expected gradients of {name} to be within {TOLERANCE:.3g} of their norm, got {error:.3g} "
            f"for {parameter}."
        )
    return error


def check_density(name: str, model: nn.Module, cell: StepCell) -> None:
    """Check that the switches are those of the cell.

    Raises:
        WrongResultError: If a switch flipped.
    """
    initial = scores(plain(), cell.density, cell.seed)
    for parameter, score in trained(model):
        expected = initial.get(parameter.removesuffix(".score")) if parameter.endswith(".score") else None
        if expected is not None and not torch.equal(score.cpu() > THRESHOLD, expected > 0):
            raise gate.WrongResultError(
                f"check_density(): expected `model` to keep its switches, got {name}: {parameter}."
            )


def step_peak(cell: StepCell, name: str) -> int:
    """Peak of the first two steps, in a new process."""
    step = StepBench(peaks=False).prepare(cell, name)
    step.enter()
    return memory.peak_bytes(lambda: [step.step(x) for x in step.inputs[:2]])


def useful_flop(cell: StepCell, full: float, kept: float) -> float:
    """FLOP of all convolutions of a step, see `benches.training.layers.useful_flop`."""
    return cell.batch * (full + kept * (2 if cell.mode == "trained" else 1))
