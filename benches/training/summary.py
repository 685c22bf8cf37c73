"""Aggregates of the rows of training: means by setting, and the targets."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from benches.ours import BACKENDS
from benches.rows import Row
from benches.summary import geomean, layer_rows
from benches.training.cells import MODES, STEP

OURS, REFERENCE = "auto", "masked"
BASES = ("masked", "dense", "naive")
# Speed-up over masked autograd by mode and density, geometric mean over the layers.
LAYER_TARGETS = {"frozen": {0.75: 1.15, 0.5: 1.35, 0.25: 1.6}, "trained": {0.75: 1.15, 0.5: 1.4, 0.25: 1.8}}
STEP_TARGETS = {"frozen": {0.75: 1.2, 0.5: 1.6, 0.25: 2.2}, "trained": {0.75: 1.2, 0.5: 1.6, 0.25: 2.4}}
MAX_MEMORY_RATIO = 1.0
LAYER, WHOLE_STEP, MEMORY = "layer over masked autograd", "step over masked autograd", "peak memory over masked"


@dataclass(frozen=True)
class Setting:
    """The cells that one mean covers; the batch is that of the network."""

    layout: str
    mode: str
    density: float


@dataclass(frozen=True)
class Mean:
    """A geometric mean of ratios, with the smallest and the largest."""

    value: float
    smallest: float
    largest: float
    count: int


@dataclass(frozen=True)
class Verdict:
    """A target with the measured ratio."""

    title: str
    setting: Setting
    count: int
    goal: float
    ratio: float
    met: bool


def setting_of(row: Row) -> Setting:
    """Return the setting of a row."""
    return Setting(row.layout, row.mode, row.density)


def settings(rows: Iterable[Row]) -> list[Setting]:
    """All settings, in order of layout, mode and falling density."""
    return sorted(set(map(setting_of, rows)), key=lambda s: (s.layout, MODES.index(s.mode), -s.density))


def step_rows(rows: Iterable[Row]) -> list[Row]:
    """Rows of whole steps."""
    return [row for row in rows if row.case == STEP]


def ratios(
    rows: Sequence[Row], setting: Setting, variant: str, base: str, quantity: Callable[[Row], float | None]
) -> Mean | None:
    """Mean over the cells of a setting of the base's quantity over the variant's; None if no cell has both."""
    by_cell: dict[str, dict[str, float]] = {}
    for row in rows:
        if setting_of(row) == setting and (value := quantity(row)) is not None and row.variant in (variant, base):
            by_cell.setdefault(row.cell, {})[row.variant] = value
    values = [pair[base] / pair[variant] for pair in by_cell.values() if len(pair) == 2 and pair[variant] > 0]
    return Mean(geomean(values), min(values), max(values), len(values)) if values and min(values) > 0 else None


def speedup(rows: Sequence[Row], setting: Setting, variant: str, base: str) -> Mean | None:
    """Mean speed-up of a variant over another."""
    return ratios(rows, setting, variant, base, lambda row: row.p50_s)


def peak_ratio(rows: Sequence[Row], setting: Setting, variant: str = OURS) -> Mean | None:
    """Peak memory of a variant over that of the reference."""
    return ratios(rows, setting, REFERENCE, variant, lambda row: row.peak_bytes or None)


def backends(rows: Iterable[Row]) -> list[str]:
    """The backends that were timed, ``auto`` first."""
    present = {row.variant for row in rows}
    return [name for name in dict.fromkeys((OURS, *BACKENDS)) if name in present]


def verdicts(rows: Iterable[Row]) -> list[Verdict]:
    """Targets, which apply to CPUs, with the measured ratios; for memory the largest ratio of a cell decides."""
    rows = [row for row in rows if row.device == "cpu"]
    speed, memory = [], []
    for title, counted, goals in (
        (LAYER, layer_rows(rows), LAYER_TARGETS),
        (WHOLE_STEP, step_rows(rows), STEP_TARGETS),
    ):
        for setting in settings(counted):
            mean, goal = speedup(counted, setting, OURS, REFERENCE), goals[setting.mode].get(setting.density)
            if mean and goal:
                speed.append(Verdict(title, setting, mean.count, goal, mean.value, mean.value >= goal))
            if peak := peak_ratio(counted, setting):
                name, met = f"{title.split()[0]}, {MEMORY}", peak.largest <= MAX_MEMORY_RATIO
                memory.append(Verdict(name, setting, peak.count, MAX_MEMORY_RATIO, peak.largest, met))
    return speed + memory
