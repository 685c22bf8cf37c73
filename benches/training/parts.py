"""Time of a whole step by part, and the bound of its speed-up.

Switches reduce the work of convolutions only. The bound is the speed-up of a step in which masked autograd's
convolutions shrink exactly with their arithmetic, and the rest takes as long as in our step.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.profiler_util import FunctionEvent

from benches.training.cells import StepCell
from benches.training.step_baselines import MaskedSwitchConv2d
from benches.training.steps import REFERENCE_IMAGES, Step, StepBench, gradients

VARIANTS = ("masked", "auto")
STEPS = 3
FORWARD, BACKWARD, NORM, REST = "convolutions", "their backward", "batch norm", "the rest"


@dataclass(frozen=True)
class Parts:
    """Profiles of a step of masked autograd and of ours.

    Args:
        cell: Id of the cell.
        layout, mode, density: Of the cell.
        seconds: {variant: {part: seconds}} of the median step.
        forward_work: Multiply-adds of ours over those of the masked network, in the forward.
        backward_work: The same in the backward, which skips zero channels of the output gradient.
    """

    cell: str
    layout: str
    mode: str
    density: float
    seconds: dict[str, dict[str, float]]
    forward_work: float
    backward_work: float

    @property
    def bound(self) -> float:
        """Bound of the speed-up over masked autograd."""
        masked, ours = (self.seconds[variant] for variant in VARIANTS)
        least = self.forward_work * masked[FORWARD] + self.backward_work * masked[BACKWARD] + ours[NORM] + ours[REST]
        return sum(masked.values()) / least

    @property
    def speedup(self) -> float:
        """Speed-up over masked autograd under the profiler."""
        masked, ours = (sum(self.seconds[variant].values()) for variant in VARIANTS)
        return masked / ours


def part_of(event: str) -> str:
    """Part of a step that an operator belongs to, by its name."""
    if "conv" in event:
        return BACKWARD if "backward" in event else FORWARD
    return NORM if "batch_norm" in event else REST


def profiled(step: Step) -> dict[str, float]:
    """Seconds of one step by part."""
    step.enter()
    # Kineto, the default, writes to the terminal.
    with torch.autograd.profiler.profile(use_kineto=False) as profile:
        step.step(step.inputs[0])
    events: Sequence[FunctionEvent] = profile.function_events or ()
    seconds = dict.fromkeys((FORWARD, BACKWARD, NORM, REST), 0.0)
    for event in events:
        seconds[part_of(event.name)] += event.self_cpu_time_total * 1e-6
    return seconds


def work(model: nn.Module, x: Tensor, labels: Tensor, trained: bool) -> tuple[float, float]:
    """Return our multiply-adds over those of the masked network, (forward, backward).

    The backward of a masked convolution multiplies all channels of the output gradient with all input channels, once
    for the input gradient and once for the weight gradient, if the weight is trained. Ours skips zero channels of the
    output gradient, and in the weight gradient also input channels that are off.

    Args:
        model: Masked network in training mode; its running statistics change.
        x: (N, 3, H, W), a few images.
        labels: (N,)
        trained: Whether convolution weights are trained.
    """
    full: dict[nn.Module, float] = {}
    live: dict[nn.Module, float] = {}

    def forward(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        weight: Any = module.weight
        full[module] = float(output[0, 0].numel() * weight.numel())

        def backward(gradient: Tensor) -> None:
            live[module] = (gradient.abs().amax((0, 2, 3)) > 0).double().mean().item()

        output.register_hook(backward)

    convs = [module for module in model.modules() if isinstance(module, MaskedSwitchConv2d)]
    hooks = [conv.register_forward_hook(forward) for conv in convs]
    gradients(model, x, labels)
    for hook in hooks:
        hook.remove()
    on = {conv: (conv.score > 0).double().mean().item() for conv in convs}
    total = sum(full.values())
    kept = sum(full[conv] * on[conv] for conv in convs)
    back = sum(full[conv] * live[conv] * (1 + (on[conv] if trained else 0)) for conv in convs)
    return kept / total, back / total / (2 if trained else 1)


def measure(bench: StepBench, cell: StepCell) -> Parts:
    """Profile a few alternating steps of masked autograd and of ours."""
    steps = {name: bench.prepare(cell, name) for name in VARIANTS}
    inputs, labels = bench.data(cell)
    masked = bench.model(cell, "masked")
    shares = work(masked, inputs[0][:REFERENCE_IMAGES], labels[:REFERENCE_IMAGES], cell.mode == "trained")
    for step in steps.values():
        step.enter()
        step.step(step.inputs[0])
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    for _ in range(STEPS):
        for name, step in steps.items():
            samples[name].append(profiled(step))
    medians = {name: sorted(profiles, key=lambda p: sum(p.values()))[STEPS // 2] for name, profiles in samples.items()}
    return Parts(cell.id, cell.layout, cell.mode, cell.density, medians, *shares)


def measure_all(
    bench: StepBench, cells: Sequence[StepCell], folder: Path, in_time: Callable[[], bool], tick: Callable[[], object]
) -> list[Parts]:
    """Measure the cells that ``parts.json`` lacks while ``in_time`` holds, and write them."""
    profiles = {profile.cell: profile for profile in read(folder)}
    for cell in cells:
        if cell.id not in profiles and in_time():
            profiles[cell.id] = measure(bench, cell)
            (folder / "parts.json").write_text(json.dumps(list(profiles.values()), indent=1, default=asdict) + "\n")
        tick()
    return list(profiles.values())


def read(folder: Path) -> list[Parts]:
    """Read the profiles of a folder; none if there is no file."""
    path = folder / "parts.json"
    return [Parts(**fields) for fields in json.loads(path.read_text())] if path.exists() else []
