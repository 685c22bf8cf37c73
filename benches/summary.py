"""What the rows say together: geometric means of speed-ups, worst cases, losses of ``auto``, and the targets."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benches.cases import MIN_MEAN_CHANNELS
from benches.rows import Row

BASES = ("dense", "masked", "naive", "best", "oracle")
# A loss within this share is noise.
NOISE = 0.05
# Above this unsteadiness other work has disturbed the study: long calls suffer more than short ones.
BUSY = 1.3
WHOLE_NETWORK = "network"
DOMAINS = "domains"
OVERHEAD = "overhead"


@dataclass(frozen=True)
class Setting:
    """What a mean is taken over all cases of."""

    layout: str
    batch: int
    lists: str
    density: float


@dataclass(frozen=True)
class Mean:
    """Geometric mean of one variant's speed-up over another, with its worst case.

    Args:
        setting: Layout, batch, lists and density.
        variant: Whose speed-up.
        base: Over whom.
        geomean: Above 1 is faster.
        count: Cases behind it.
        worst: Smallest speed-up of a case.
        worst_case: Where that was.
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
    """A case in which a variant is slower than it may be."""

    cell: str
    variant: str
    candidate: str
    base: str
    speedup: float


@dataclass(frozen=True)
class Target:
    """A figure to reach.

    Args:
        title: What it is about.
        lists: ``in`` or ``both``.
        base: Over whom the speed-up is taken.
        values: Figure by density.
        each: Whether every case must reach it, and not only the mean.
        pointwise: Only 1x1 convolutions.
        layout: Only this memory format.
    """

    title: str
    lists: str
    base: str
    values: dict[float, float]
    each: bool = False
    pointwise: bool = False
    layout: str | None = None

    def applies(self, row: Row) -> bool:
        """Whether a row counts for it."""
        return (
            row.lists == self.lists
            and row.density in self.values
            and (not self.pointwise or row.kernel == 1)
            and self.layout in (None, row.layout)
        )


def _same(value: float) -> dict[float, float]:
    return dict.fromkeys((0.75, 0.5, 0.25), value)


# For fp32 on a CPU. "Never slower than gather + conv" means beyond noise.
TARGETS = (
    Target("in over dense", "in", "dense", {0.75: 1.28, 0.5: 1.9, 0.25: 3.6}),
    Target("in over oracle", "in", "oracle", _same(1.0)),
    Target("in over oracle, each", "in", "oracle", _same(0.9), each=True),
    Target("in over gather + conv, each", "in", "best", _same(1 - NOISE), each=True),
    Target("both over dense", "both", "dense", {0.75: 1.65, 0.5: 3.4, 0.25: 10.0}),
    Target("both over oracle", "both", "oracle", _same(1.0)),
    Target("1x1 in over naive", "in", "naive", _same(3.0), pointwise=True, layout="channels_last"),
)


@dataclass(frozen=True)
class Verdict:
    """A target beside what was measured."""

    target: Target
    setting: Setting
    wanted: float
    figures: dict[str, float]
    count: int
    met: bool


def geomean(values: Iterable[float]) -> float:
    """Geometric mean of positive numbers.

    Examples:
        >>> round(geomean([1.0, 4.0]), 6)
        2.0
    """
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def layer_rows(rows: Iterable[Row]) -> list[Row]:
    """Rows of single convolutions that count in the means."""
    return [row for row in rows if row.C_in is not None and row.C_in >= MIN_MEAN_CHANNELS]


def network_rows(rows: Iterable[Row]) -> list[Row]:
    """Rows of whole networks."""
    return [row for row in rows if row.case == WHOLE_NETWORK]


def overhead_rows(rows: Iterable[Row]) -> list[Row]:
    """Rows of call overhead."""
    return [row for row in rows if row.network == OVERHEAD]


def unsteadiness(rows: Iterable[Row]) -> float:
    """Median over all rows of p80 / p20: near 1 on a quiet machine."""
    return statistics.median([row.p80_s / row.p20_s for row in rows] or [1.0])


def setting_of(row: Row) -> Setting:
    """Return the setting of a row."""
    return Setting(row.layout, row.batch, row.lists, row.density)


def settings(rows: Iterable[Row]) -> list[Setting]:
    """Settings that occur, in order of layout, batch, lists and falling density."""
    return sorted({setting_of(row) for row in rows}, key=lambda s: (s.layout, s.batch, s.lists != "in", -s.density))


def subjects(rows: Iterable[Row]) -> list[str]:
    """Return the variants that the report is about: native and auto, or PyTorch's best where these were not timed."""
    present = {row.variant for row in rows}
    ours: list[str] = [variant for variant in ("native", "auto", "triton", "cuda") if variant in present]
    theirs: list[str] = [variant for variant in ("best", "oracle") if variant in present]
    return ours or theirs


def means(rows: Sequence[Row], variants: Sequence[str], bases: Sequence[str] = BASES) -> list[Mean]:
    """Mean speed-ups of the variants over the bases, by setting, over the cases with enough channels."""
    rows = layer_rows(rows)
    found = []
    for setting in settings(rows):
        for variant in variants:
            of_variant = [row for row in rows if row.variant == variant and setting_of(row) == setting]
            for base in bases:
                pairs = [(speedup, row.cell) for row in of_variant if (speedup := row.speedup(base)) is not None]
                if pairs and variant != base:
                    worst, cell = min(pairs)
                    found.append(Mean(setting, variant, base, geomean(s for s, _ in pairs), len(pairs), worst, cell))
    return found


def losses(rows: Iterable[Row], variant: str = "auto", bases: Sequence[str] = ("dense", "best")) -> list[Loss]:
    """Cases in which a variant is slower than a base by more than noise, the worst first."""
    found = [
        Loss(row.cell, row.variant, row.candidate, base, speedup)
        for row in rows
        if row.variant == variant and row.C_in is not None
        for base in bases
        if (speedup := row.speedup(base)) is not None and speedup < 1 - NOISE
    ]
    return sorted(found, key=lambda loss: loss.speedup)


def verdicts(rows: Iterable[Row], variants: Sequence[str]) -> list[Verdict]:
    """Targets beside the figures, by layout, batch and density. The last variant, what a user gets, decides."""
    rows = [row for row in layer_rows(rows) if row.device == "cpu" and row.dtype == "float32"]
    found = []
    for target in TARGETS:
        counted = [row for row in rows if target.applies(row)]
        for setting in settings(counted):
            figures, count = {}, 0
            for variant in variants:
                speedups = [
                    speedup
                    for row in counted
                    if row.variant == variant
                    and setting_of(row) == setting
                    and (speedup := row.speedup(target.base)) is not None
                ]
                if speedups:
                    figures[variant] = min(speedups) if target.each else geomean(speedups)
                    count = len(speedups)
            if figures:
                wanted = target.values[setting.density]
                found.append(Verdict(target, setting, wanted, figures, count, list(figures.values())[-1] >= wanted))
    return found
