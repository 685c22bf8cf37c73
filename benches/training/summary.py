"""What the rows of training say together: means by setting, and the targets."""

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
MOST_MEMORY = 1.0
LAYER, WHOLE_STEP, MEMORY = (
    "layer over masked autograd",
    "step over masked autograd",
    "peak memory of masked autograd's",
)


@dataclass(frozen=True)
class Setting:
    """What a mean is taken over all layers of; batches are those of the networks."""

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
    """A target beside what was measured."""

    title: str
    setting: Setting
    count: int
    wanted: float
    figure: float
    met: bool


def setting_of(row: Row) -> Setting:
    """Return the setting of a row."""
    return Setting(row.layout, row.mode, row.density)


def settings(rows: Iterable[Row]) -> list[Setting]:
    """Settings that occur, in order of layout, mode and falling density."""
    return sorted({setting_of(row) for row in rows}, key=lambda s: (s.layout, MODES.index(s.mode), -s.density))


def step_rows(rows: Iterable[Row]) -> list[Row]:
    """Rows of whole steps."""
    return [row for row in rows if row.case == STEP]


def ratios(
    rows: Sequence[Row], setting: Setting, variant: str, base: str, of: Callable[[Row], float | None]
) -> Mean | None:
    """Mean over the cells of a setting of a figure of ``base`` over that of ``variant``; None where neither has it."""
    mine = [row for row in rows if setting_of(row) == setting]
    found: dict[str, dict[str, float]] = {}
    for row in mine:
        if (value := of(row)) is not None and row.variant in (variant, base):
            found.setdefault(row.cell, {})[row.variant] = value
    values = [pair[base] / pair[variant] for pair in found.values() if len(pair) == 2 and pair[variant] > 0]
    return Mean(geomean(values), min(values), max(values), len(values)) if values and min(values) > 0 else None


def speedup(rows: Sequence[Row], setting: Setting, variant: str, base: str) -> Mean | None:
    """Mean speed-up of a variant over another."""
    return ratios(rows, setting, variant, base, lambda row: row.p50_s)


def peak_share(rows: Sequence[Row], setting: Setting, variant: str = OURS) -> Mean | None:
    """A variant's peak memory as a share of the reference's."""
    return ratios(rows, setting, REFERENCE, variant, lambda row: float(row.peak_bytes) if row.peak_bytes else None)


def backends(rows: Iterable[Row]) -> list[str]:
    """Ours first, then the backends that were named."""
    present = {row.variant for row in rows}
    return [name for name in (OURS, *(name for name in BACKENDS if name != OURS)) if name in present]


def verdicts(rows: Iterable[Row]) -> list[Verdict]:
    """Targets, which are of CPUs, beside the figures; of memory, the largest share of any cell decides."""
    rows = [row for row in rows if row.device == "cpu"]
    found = []
    groups = ((LAYER, layer_rows(rows), LAYER_TARGETS), (WHOLE_STEP, step_rows(rows), STEP_TARGETS))
    for title, counted, targets in groups:
        for setting in settings(counted):
            mean, wanted = speedup(counted, setting, OURS, REFERENCE), targets[setting.mode].get(setting.density)
            if mean and wanted:
                found.append(Verdict(title, setting, mean.count, wanted, mean.value, mean.value >= wanted))
    for title, counted, _ in groups:
        for setting in settings(counted):
            if share := peak_share(counted, setting):
                name = f"{title.split()[0]}, {MEMORY}"
                found.append(
                    Verdict(name, setting, share.count, MOST_MEMORY, share.largest, share.largest <= MOST_MEMORY)
                )
    return found
