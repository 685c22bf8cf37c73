"""Aggregates of the rows: geometric means of speed-ups, worst cases, losses of ``auto``, and the targets."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benches.cases import LISTS, MIN_MEAN_CHANNELS
from benches.rows import Row

BASES = ("dense", "masked", "naive", "gather_conv", "oracle")
# Differences within this share are noise.
NOISE = 0.05
# Above this unsteadiness other processes disturbed the study.
BUSY = 1.3
WHOLE_NETWORK = "network"
DOMAINS = "domains"
OVERHEAD = "overhead"
# Variants of whole networks that a user would deploy instead of a plan: the pruned copy, run in several ways.
COPIES = ("pruned", "compiled", "onnxruntime", "openvino")


@dataclass(frozen=True)
class Setting:
    """The cells that one mean covers."""

    layout: str
    batch: int
    lists: str
    density: float


@dataclass(frozen=True)
class Mean:
    """Geometric mean of the speed-ups of a variant over a base, with the worst case.

    Args:
        setting: Layout, batch, lists and density.
        variant: The variant.
        base: The variant that it is compared with.
        geomean: Above 1 is faster.
        count: Number of cases.
        worst: Smallest speed-up.
        worst_case: Id of its cell.
    """

    setting: Setting
    variant: str
    base: str
    geomean: float
    count: int
    worst: float
    worst_case: str


@dataclass(frozen=True)
class Loss:
    """A case in which a variant is slower than a base by more than noise."""

    cell: str
    variant: str
    candidate: str
    base: str
    speedup: float


@dataclass(frozen=True)
class Target:
    """A speed-up to reach.

    Args:
        title: Heading.
        lists: of `benches.cases.LISTS`.
        base: The variant that the speed-up is taken over.
        values: Speed-up by density.
        each: Whether every case must reach it, not only the mean.
        pointwise: Whether it applies to 1x1 convolutions only.
        layout: The only layout it applies to; None for all.
    """

    title: str
    lists: str
    base: str
    values: dict[float, float]
    each: bool = False
    pointwise: bool = False
    layout: str | None = None

    def applies(self, row: Row) -> bool:
        """Whether a row counts."""
        return (
            row.lists == self.lists
            and row.density in self.values
            and (not self.pointwise or row.kernel == 1)
            and self.layout in (None, row.layout)
        )


def _constant(value: float) -> dict[float, float]:
    return dict.fromkeys((0.75, 0.5, 0.25), value)


# For float32 on a CPU.
TARGETS = (
    Target("in over dense", "in", "dense", {0.75: 1.28, 0.5: 1.9, 0.25: 3.6}),
    Target("in over oracle", "in", "oracle", _constant(1.0)),
    Target("in over oracle, each", "in", "oracle", _constant(0.9), each=True),
    Target("in over gather + conv, each", "in", "gather_conv", _constant(1 - NOISE), each=True),
    Target("both over dense", "both", "dense", {0.75: 1.65, 0.5: 3.4, 0.25: 10.0}),
    Target("both over oracle", "both", "oracle", _constant(1.0)),
    Target("1x1 in over naive", "in", "naive", _constant(3.0), pointwise=True, layout="channels_last"),
)


@dataclass(frozen=True)
class Verdict:
    """A target with the measured speed-ups by variant."""

    target: Target
    setting: Setting
    goal: float
    speedups: dict[str, float]
    count: int
    met: bool


def geomean(values: Iterable[float]) -> float:
    """Geometric mean of positive numbers.

    Examples:
        >>> round(geomean([1.0, 4.0]), 6)
        2.0
    """
    return math.exp(statistics.fmean(map(math.log, values)))


def layer_rows(rows: Iterable[Row]) -> list[Row]:
    """Rows of single convolutions that count in the means."""
    return [row for row in rows if row.C_in is not None and row.C_in >= MIN_MEAN_CHANNELS]


def network_rows(rows: Iterable[Row]) -> list[Row]:
    """Rows of whole networks."""
    return [row for row in rows if row.case == WHOLE_NETWORK]


def unsteadiness(rows: Iterable[Row]) -> float:
    """Median over all rows of p80 / p20: near 1 on a quiet machine."""
    return statistics.median([row.p80_s / row.p20_s for row in rows] or [1.0])


def setting_of(row: Row) -> Setting:
    """Return the setting of a row."""
    return Setting(row.layout, row.batch, row.lists, row.density)


def settings(rows: Iterable[Row]) -> list[Setting]:
    """All settings, in order of layout, batch, lists and falling density."""
    return sorted(set(map(setting_of, rows)), key=lambda s: (s.layout, s.batch, LISTS.index(s.lists), -s.density))


def reported_variants(rows: Iterable[Row]) -> list[str]:
    """Return the backends that were timed, or the strongest baselines where none was."""
    present = {row.variant for row in rows}
    backends: list[str] = [variant for variant in ("native", "auto", "triton", "cuda") if variant in present]
    return backends or [variant for variant in BASES[3:] if variant in present]


def means(rows: Sequence[Row], variants: Sequence[str], bases: Sequence[str] = BASES) -> list[Mean]:
    """Mean speed-ups of the variants over the bases by setting, over the cases that count in the means."""
    rows = layer_rows(rows)
    result = []
    for setting in settings(rows):
        for variant in variants:
            of_variant = [row for row in rows if row.variant == variant and setting_of(row) == setting]
            for base in bases:
                pairs = [(speedup, row.cell) for row in of_variant if (speedup := row.speedup(base)) is not None]
                if pairs and variant != base:
                    worst, cell = min(pairs)
                    result.append(Mean(setting, variant, base, geomean(s for s, _ in pairs), len(pairs), worst, cell))
    return result


def losses(rows: Iterable[Row], variant: str = "auto", bases: Sequence[str] = ("dense", "gather_conv")) -> list[Loss]:
    """Cases in which a variant is slower than a base by more than noise, the worst first."""
    cases = [
        Loss(row.cell, row.variant, row.candidate, base, speedup)
        for row in rows
        if row.variant == variant and row.C_in is not None
        for base in bases
        if (speedup := row.speedup(base)) is not None and speedup < 1 - NOISE
    ]
    return sorted(cases, key=lambda loss: loss.speedup)


def verdicts(rows: Iterable[Row], variants: Sequence[str]) -> list[Verdict]:
    """Targets with the measured speed-ups, by layout, batch and density. The last variant decides."""
    rows = [row for row in layer_rows(rows) if row.device == "cpu" and row.dtype == "float32"]
    result = []
    for target in TARGETS:
        counted = [row for row in rows if target.applies(row)]
        for setting in settings(counted):
            pairs = [(row.variant, row.speedup(target.base)) for row in counted if setting_of(row) == setting]
            by_variant = {
                variant: speedups
                for variant in variants
                if (speedups := [value for name, value in pairs if name == variant and value is not None])
            }
            if by_variant:
                goal, last = target.values[setting.density], list(by_variant)[-1]
                shown = {name: (min if target.each else geomean)(values) for name, values in by_variant.items()}
                met = shown[last] >= goal
                result.append(Verdict(target, setting, goal, shown, len(by_variant[last]), met))
    return result
