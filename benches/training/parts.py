"""Where the time of a whole step goes, and what bounds its speed-up.

Only convolutions get less work from switches. If their times in masked autograd shrank exactly with their arithmetic,
and all the rest took what it takes in our step, the step would be as fast as it can be without faster convolutions than
PyTorch's own: that is the bound.
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
from benches.training.steps import GATED_IMAGES, Step, StepBench, gradients

BASELINES = ("masked", "auto")
STEPS = 3
FORWARD, BACKWARD, NORM, REST = "convolutions", "their backward", "batch norm", "the rest"


@dataclass(frozen=True)
class Parts:
    """A step of masked autograd beside one of ours, in seconds by part.

    Args:
        cell: Id of the step.
        layout, mode, density: Of the cell.
        seconds: {variant: {part: seconds}}, medians of a few profiled steps.
        forward_work: Multiply-adds of ours as a share of the masked network's, in the forward.
        backward_work: The same in the backward, where channels of the output gradient that are zero are left out.
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
        """Speed-up over masked autograd that the arithmetic allows."""
        masked, ours = (self.seconds[variant] for variant in BASELINES)
        least = self.forward_work * masked[FORWARD] + self.backward_work * masked[BACKWARD] + ours[NORM] + ours[REST]
        return sum(masked.values()) / least

    @property
    def speedup(self) -> float:
        """Speed-up over masked autograd under the profiler."""
        masked, ours = (sum(self.seconds[variant].values()) for variant in BASELINES)
        return masked / ours


def part_of(event: str) -> str:
    """Part of a step that an operator's own time belongs to, by its name."""
    if "conv" in event:
        return BACKWARD if "backward" in event else FORWARD
    return NORM if "batch_norm" in event else REST


def profiled(step: Step) -> dict[str, float]:
    """Seconds of one step by part."""
    step.enter()
    # Kineto, the default, writes lines of its own to the terminal.
    with torch.autograd.profiler.profile(use_kineto=False) as profile:
        step.step(step.inputs[0])
    events: Sequence[FunctionEvent] = profile.function_events or ()
    found = dict.fromkeys((FORWARD, BACKWARD, NORM, REST), 0.0)
    for event in events:
        found[part_of(event.name)] += event.self_cpu_time_total * 1e-6
    return found


def work(model: nn.Module, x: Tensor, labels: Tensor, trained: bool) -> tuple[float, float]:
    """Multiply-adds that switches leave, (forward, backward), as shares of the masked network's.

    The backward of a masked convolution multiplies all channels of its output gradient with all input channels, once
    for the input's gradient and once more for the weight's, if it is trained. Ours leaves out channels of the output
    gradient that are zero, and in the weight's gradient also input channels that are off.

    Args:
        model: Masked network in training mode; a copy, as running statistics move.
        x: (N, 3, H, W), a few images.
        labels: (N,)
        trained: Whether the convolutions' weights are trained.
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
    everything = sum(full.values())
    kept = sum(full[conv] * on[conv] for conv in convs)
    back = sum(full[conv] * live[conv] * (1 + (on[conv] if trained else 0)) for conv in convs)
    return kept / everything, back / everything / (2 if trained else 1)


def measure(bench: StepBench, cell: StepCell) -> Parts:
    """Profile a few steps of masked autograd and of ours, in turns."""
    steps = {name: bench.prepare(cell, name) for name in BASELINES}
    inputs, labels = bench.data(cell)
    masked = bench.model(cell, "masked")
    shares = work(masked, inputs[0][:GATED_IMAGES], labels[:GATED_IMAGES], cell.mode == "trained")
    for step in steps.values():
        step.enter()
        step.step(step.inputs[0])
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in BASELINES}
    for _ in range(STEPS):
        for name, step in steps.items():
            samples[name].append(profiled(step))
    middle = {name: sorted(taken, key=lambda one: sum(one.values()))[STEPS // 2] for name, taken in samples.items()}
    return Parts(cell.id, cell.layout, cell.mode, cell.density, middle, *shares)


def measure_all(
    bench: StepBench, cells: Sequence[StepCell], folder: Path, until: Callable[[], bool], tick: Callable[[], object]
) -> list[Parts]:
    """Measure what ``parts.json`` does not hold yet, as long as `until` says so, and write it."""
    found = {one.cell: one for one in read(folder)}
    for cell in cells:
        if cell.id not in found and until():
            found[cell.id] = measure(bench, cell)
            (folder / "parts.json").write_text(json.dumps([asdict(one) for one in found.values()], indent=1) + "\n")
        tick()
    return list(found.values())


def read(folder: Path) -> list[Parts]:
    """Read what was measured; nothing where nothing was."""
    path = folder / "parts.json"
    return [Parts(**one) for one in json.loads(path.read_text())] if path.exists() else []
