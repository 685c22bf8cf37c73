"""The loss of a small network over 200 steps, with the package's layers and with masked autograd.

Both start from the same weights and scores and see the same batches of scikit-learn's digits at 32x32, in float32 and
in float64. The loss is the cross entropy plus a pressure on the share of switches that are on, so that switches turn;
the pressure stands for no published budget. In float32 the two round differently: their losses are equal at first and
then drift apart, since a rounding error grows from step to step and a switch may turn in another step. In float64,
where the package goes through PyTorch's own operators, that takes far longer.

How much drift rounding alone makes is measured on masked autograd itself, run twice more:
    channels_last: with weights and images in that memory format
    reversed:      with the samples of every batch in reverse order
Both compute the very same sums of the very same numbers, in another order.
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
# Masked autograd with other rounding.
YARDSTICKS = ("channels_last", "reversed")
BASELINES = (REFERENCE, OURS, *YARDSTICKS)
# Differences of the loss whose first step is reported.
SMALL, LARGE = 1e-4, 1e-2
DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass
class Curve:
    """Losses of one variant.

    Args:
        variant: Of `BASELINES`.
        dtype: Of everything.
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
    """How far a curve lies from masked autograd's of the same dtype.

    Args:
        dtype: Of both.
        variant: Whose curve.
        early: Largest difference of the loss in the first steps.
        largest: In all.
        small_at, large_at: First steps that differ by `SMALL` and by `LARGE`; None if none does.
        switches: How many differ after the last step, of ``all_switches``.
        first, last: Losses of the variant.
        density: Of the variant, at last.
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
    """Five convolutions with batch norm and ReLU, and a classifier; the same weights in every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for before, width, stride in zip((1, *WIDTHS), WIDTHS, STRIDES, strict=False):
            layers += [nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTHS[-1], CLASSES))


def start_scores(channels: int, generator: torch.Generator) -> Tensor:
    """Scores around the initial value; some lie below the threshold."""
    return INITIAL + SPREAD * torch.randn(channels, generator=generator)


def build(variant: str) -> nn.Sequential:
    """One variant's network with its scores."""
    model = network()
    generator = torch.Generator().manual_seed(1)
    given = {
        name: start_scores(module.in_channels, generator)
        for name, module in model.named_children()
        if isinstance(module, nn.Conv2d) and name != STEM
    }
    if variant != OURS:
        for name, score in given.items():
            model[int(name)] = MaskedSwitchConv2d(model[int(name)], score)  # type: ignore[arg-type]
        return model.to(memory_format=torch.channels_last) if variant == "channels_last" else model
    bk = ours.package()
    bk.nn.switch_(model, [DOMAIN], lambda module, name: name != STEM, threshold=THRESHOLD)
    bk.set_domain(model, DOMAIN)
    with torch.no_grad():
        for name, score in given.items():
            model.get_submodule(name).domains[DOMAIN].score.copy_(score)  # type: ignore[union-attr, index]
    return model


def digits(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """All digits, (1797, 1, 32, 32), and what they are."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.from_numpy(found.images)[:, None] / 8 - 1
    sized = F.interpolate(images, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    return sized.to(dtype), torch.from_numpy(found.target)


def train(variant: str, dtype: str, steps: int = STEPS, tick: Callable[[], object] = lambda: None) -> Curve:
    """Train one variant's network.

    Args:
        variant: Of `BASELINES`.
        dtype: ``float32`` or ``float64``.
        steps: How many.
        tick: Called after each step.
    """
    model = build(variant).to(DTYPES[dtype]).train()
    if variant != OURS:
        # The package keeps scores in float32 whatever the model's dtype, and so does its variant.
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
        picked = order[step * BATCH : (step + 1) * BATCH]
        if variant == "reversed":
            picked = picked.flip(0)
        x = images[picked].contiguous(memory_format=memory_format)
        share = torch.cat([(s > THRESHOLD).to(s.dtype) + s - s.detach() for s in scores]).mean()
        loss = F.cross_entropy(model(x), labels[picked]) + PRESSURE * share
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
    """Compare every variant that is there with masked autograd in the same dtype."""
    found = []
    for dtype in dict.fromkeys(curve.dtype for curve in curves):
        mine = {curve.variant: curve for curve in curves if curve.dtype == dtype}
        masked = mine[REFERENCE]
        for variant in (name for name in BASELINES if name in mine and name != REFERENCE):
            other = mine[variant]
            apart = differences(masked, other)
            turned = sum(a != b for a, b in zip(masked.switches, other.switches, strict=True))
            found.append(
                Comparison(
                    dtype,
                    variant,
                    max(apart[:EARLY]),
                    max(apart),
                    first_beyond(apart, SMALL),
                    first_beyond(apart, LARGE),
                    turned,
                    len(other.switches),
                    other.losses[0],
                    other.losses[-1],
                    other.density,
                )
            )
    return found


def differences(masked: Curve, other: Curve) -> list[float]:
    """How far the losses lie apart, step by step."""
    return [abs(a - b) for a, b in zip(masked.losses, other.losses, strict=True)]


def first_beyond(apart: Sequence[float], limit: float) -> int | None:
    """Return the first step whose difference is ``limit`` or more; None if there is none."""
    return next((step for step, value in enumerate(apart) if value >= limit), None)


def verdict(compared: Sequence[Comparison], dtype: str) -> str:
    """Say whether ours parts from masked autograd sooner or further than masked autograd from itself."""
    mine = [one for one in compared if one.dtype == dtype and one.variant == OURS]
    itself = [one for one in compared if one.dtype == dtype and one.variant in YARDSTICKS]
    if not (mine and itself):
        return ""
    (ours_apart,) = mine
    far = float("inf")

    def step(one: Comparison) -> float:
        return far if one.large_at is None else one.large_at

    soonest, furthest = min(map(step, itself)), max(one.largest for one in itself)
    sooner = "sooner than" if step(ours_apart) < soonest else "no sooner than"
    further = "further than" if ours_apart.largest > furthest else "no further than"
    return f"In {dtype} ours parts from masked autograd {sooner}, and {further}, masked autograd from itself."


def write(folder: Path, curves: Sequence[Curve]) -> None:
    """Write ``curve.json`` (everything) and ``curve.csv`` (a line per step)."""
    content: dict[str, Any] = {
        "curves": [asdict(one) for one in curves],
        "compared": [asdict(c) for c in compare(curves)],
    }
    (folder / "curve.json").write_text(json.dumps(content, indent=1) + "\n")
    with (folder / "curve.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *(f"{curve.variant}_{curve.dtype}" for curve in curves)])
        writer.writerows([i, *row] for i, row in enumerate(zip(*(curve.losses for curve in curves), strict=True)))


def read(folder: Path) -> list[Curve]:
    """Read what `write` wrote; nothing where it wrote nothing."""
    path = folder / "curve.json"
    return [Curve(**one) for one in json.loads(path.read_text())["curves"]] if path.exists() else []
