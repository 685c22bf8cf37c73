"""Losses of a small network over 200 steps, with the package's layers and with masked autograd.

Both start from the same weights and scores and see the same batches of scikit-learn's digits at 32x32, in float32 and
in float64. The loss is the cross entropy plus a penalty on the share of switches that are on, so that switches flip;
the penalty stands for no published budget. In float32 the two round differently: their losses are equal at first and
then diverge, because a rounding error grows from step to step and a switch may flip in another step. In float64, where
the package uses PyTorch's own operators, divergence takes far longer.

The divergence by rounding alone is measured on masked autograd itself, run twice more:
    channels_last: with weights and images in that memory format
    reversed:      with the samples of every batch in reverse order
Both compute the same sums of the same numbers, in another order.
"""

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benches import ours
from benches.training.step_baselines import MaskedSwitchConv2d

STEPS, EARLY = 200, 20
BATCH, SIZE, CLASSES = 32, 32, 10
RATE, MOMENTUM = 0.05, 0.9
# Scores start around the threshold and move by this much a step, whatever their gradient (Adam).
SCORE_RATE = 3e-4
INITIAL, SPREAD, THRESHOLD = 1e-2, 5e-3, 5e-3
PRESSURE = 0.3
WIDTHS = (16, 32, 32, 64, 64)
STRIDES = (1, 2, 1, 2, 1)
STEM = "0"
DOMAIN = "digits"
REFERENCE, OURS = "masked", "auto"
# Masked autograd with another order of summation.
REORDERED = ("channels_last", "reversed")
VARIANTS = (REFERENCE, OURS, *REORDERED)
# Differences of the loss; the first step that reaches them is reported.
SMALL, LARGE = 1e-4, 1e-2
DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass
class Curve:
    """Losses of one variant.

    Args:
        variant: Of `VARIANTS`.
        dtype: ``float32`` or ``float64``.
        losses: Of every step, before its update.
        density: Share of switches that are on after the last step.
        switches: All switches after the last step.
    """

    variant: str
    dtype: str
    losses: list[float] = field(default_factory=list)
    density: float = 1.0
    switches: list[bool] = field(default_factory=list)


@dataclass
class Comparison:
    """Differences of a curve from that of masked autograd in the same dtype.

    Args:
        dtype: Of both.
        variant: Of the curve.
        early: Largest difference of the loss in the first `EARLY` steps.
        largest: Largest difference of the loss.
        small_at, large_at: First steps that differ by `SMALL` and by `LARGE`, or None.
        switches: Number of switches, of ``all_switches``, that differ after the last step.
        first, last: Losses of the variant.
        density: Of the variant after the last step.
    """

    dtype: str
    variant: str
    early: float
    largest: float
    small_at: int | None
    large_at: int | None
    switches: int
    all_switches: int
    first: float
    last: float
    density: float


def network() -> nn.Sequential:
    """Return five convolutions with batch norm and ReLU, and a classifier, always with the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for before, width, stride in zip((1, *WIDTHS), WIDTHS, STRIDES, strict=False):
            layers += [nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTHS[-1], CLASSES))


def start_scores(channels: int, generator: torch.Generator) -> Tensor:
    """Draw scores around the initial value; some lie below the threshold."""
    return INITIAL + SPREAD * torch.randn(channels, generator=generator)


def build(variant: str) -> nn.Sequential:
    """Return the network of a variant."""
    model = network()
    generator = torch.Generator().manual_seed(1)
    scores = {
        name: start_scores(module.in_channels, generator)
        for name, module in model.named_children()
        if isinstance(module, nn.Conv2d) and name != STEM
    }
    if variant != OURS:
        for name, score in scores.items():
            model[int(name)] = MaskedSwitchConv2d(model[int(name)], score)  # type: ignore[arg-type]
        return model.to(memory_format=torch.channels_last) if variant == "channels_last" else model
    bk = ours.package()
    bk.nn.switch_(model, [DOMAIN], lambda module, name: name != STEM, threshold=THRESHOLD)
    bk.set_domain(model, DOMAIN)
    with torch.no_grad():
        for name, score in scores.items():
            model.get_submodule(name).domains[DOMAIN].score.copy_(score)  # type: ignore[union-attr, index]
    return model


def digits(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return all digits, (1797, 1, 32, 32), and their labels."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images)[:, None] / 8 - 1
    images = F.interpolate(images, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    return images.to(dtype), torch.from_numpy(bunch.target)


def train(variant: str, dtype: str, steps: int = STEPS, tick: Callable[[], object] = lambda: None) -> Curve:
    """Train the network of a variant.

    Args:
        variant: Of `VARIANTS`.
        dtype: ``float32`` or ``float64``.
        steps: Number of steps.
        tick: Called after each step.
    """
    model = build(variant).to(DTYPES[dtype]).train()
    if variant != OURS:
        # The package keeps scores in float32 whatever the model's dtype.
        for module in model:
            if isinstance(module, MaskedSwitchConv2d):
                module.score.data = module.score.data.float()
    scores = [p for name, p in model.named_parameters() if name.endswith("score")]
    others = [p for name, p in model.named_parameters() if not name.endswith("score")]
    optimisers = [torch.optim.SGD(others, lr=RATE, momentum=MOMENTUM), torch.optim.Adam(scores, lr=SCORE_RATE)]
    images, labels = digits(DTYPES[dtype])
    memory_format = torch.channels_last if variant == "channels_last" else torch.contiguous_format
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(2)).repeat(-(-steps * BATCH // 1797))
    curve = Curve(variant, dtype)
    for step in range(steps):
        batch = order[step * BATCH : (step + 1) * BATCH]
        if variant == "reversed":
            batch = batch.flip(0)
        x = images[batch].contiguous(memory_format=memory_format)
        share = torch.cat([(s > THRESHOLD).to(s.dtype) + s - s.detach() for s in scores]).mean()
        loss = F.cross_entropy(model(x), labels[batch]) + PRESSURE * share
        loss.backward()
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        curve.losses.append(loss.item())
        tick()
    curve.switches = (torch.cat([s.detach() for s in scores]) > THRESHOLD).tolist()
    curve.density = sum(curve.switches) / len(curve.switches)
    return curve


def compare(curves: Sequence[Curve]) -> list[Comparison]:
    """Compare every curve with that of masked autograd in the same dtype."""
    comparisons = []
    for dtype in dict.fromkeys(curve.dtype for curve in curves):
        by_variant = {curve.variant: curve for curve in curves if curve.dtype == dtype}
        masked = by_variant[REFERENCE]
        for variant in (name for name in VARIANTS if name in by_variant and name != REFERENCE):
            curve = by_variant[variant]
            errors = differences(masked, curve)
            comparison = Comparison(
                dtype,
                variant,
                max(errors[:EARLY]),
                max(errors),
                first_beyond(errors, SMALL),
                first_beyond(errors, LARGE),
                sum(a != b for a, b in zip(masked.switches, curve.switches, strict=True)),
                len(curve.switches),
                curve.losses[0],
                curve.losses[-1],
                curve.density,
            )
            comparisons.append(comparison)
    return comparisons


def differences(masked: Curve, other: Curve) -> list[float]:
    """Absolute differences of the losses, step by step."""
    return [abs(a - b) for a, b in zip(masked.losses, other.losses, strict=True)]


def first_beyond(differences: Sequence[float], limit: float) -> int | None:
    """Return the first step whose difference is at least ``limit``, or None."""
    return next((step for step, value in enumerate(differences) if value >= limit), None)


def verdict(comparisons: Sequence[Comparison], dtype: str) -> str:
    """Say whether ours diverges from masked autograd sooner or further than masked autograd from itself."""
    of_dtype = {comparison.variant: comparison for comparison in comparisons if comparison.dtype == dtype}
    reordered = [of_dtype[name] for name in REORDERED if name in of_dtype]
    if OURS not in of_dtype or not reordered:
        return ""

    def step(comparison: Comparison) -> float:
        return float("inf") if comparison.large_at is None else comparison.large_at

    ours = of_dtype[OURS]
    sooner = "sooner than" if step(ours) < min(map(step, reordered)) else "no sooner than"
    further = "further than" if ours.largest > max(c.largest for c in reordered) else "no further than"
    return f"In {dtype} ours diverges from masked autograd {sooner}, and {further}, masked autograd from itself."


def write(folder: Path, curves: Sequence[Curve]) -> None:
    """Write ``curve.json`` (everything) and ``curve.csv`` (one line per step)."""
    content: dict[str, Any] = {"curves": curves, "comparisons": compare(curves)}
    (folder / "curve.json").write_text(json.dumps(content, indent=1, default=asdict) + "\n")
    with (folder / "curve.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *(f"{curve.variant}_{curve.dtype}" for curve in curves)])
        writer.writerows([i, *row] for i, row in enumerate(zip(*(curve.losses for curve in curves), strict=True)))


def read(folder: Path) -> list[Curve]:
    """Read the curves of a folder; none if there is no file."""
    path = folder / "curve.json"
    return [Curve(**fields) for fields in json.loads(path.read_text())["curves"]] if path.exists() else []
