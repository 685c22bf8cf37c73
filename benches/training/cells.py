"""Cells of training: single convolutions and whole steps, with frozen or trained weights."""

import itertools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from benches.cases import CASES, MIN_MEAN_CHANNELS, Cell

MODES = ("frozen", "trained")
# Batches that fit the networks' image sizes: 224 and 64 pixels.
BATCHES = {"resnet50": 8, "resnet26": 32}
# The most informative first, so that a study whose time runs out has complete passes over the cases.
PASSES = tuple((layout, density) for density in (0.5, 0.25, 0.75) for layout in ("nchw", "channels_last"))
STEP = "step"


@dataclass(frozen=True)
class LayerCell:
    """Forward and backward of one convolution; the in-list of `cell` holds the channels whose switch is on."""

    cell: Cell
    mode: str

    @property
    def id(self) -> str:
        """Name in ids and tables, such as ``resnet26-b32-8x8-256-256-k3s1-d50-in-nchw-frozen``."""
        return f"{self.cell.id}-{self.mode}"


@dataclass(frozen=True)
class StepCell:
    """One training step of ResNet-26."""

    batch: int
    density: float
    layout: str
    mode: str
    lists: ClassVar[str] = "in"

    @property
    def id(self) -> str:
        """Name in ids and tables, such as ``resnet26-b32-step-d50-in-nchw-frozen``."""
        return f"resnet26-b{self.batch}-{STEP}-d{self.density * 100:.0f}-in-{self.layout}-{self.mode}"

    @property
    def seed(self) -> int:
        """Seed of the switches, the same for all batches, layouts and modes."""
        return zlib.crc32(f"resnet26-{STEP}-d{self.density * 100:.0f}".encode())


def passes(layouts: Sequence[str], densities: Sequence[float]) -> list[tuple[str, float]]:
    """Return pairs of layout and density, those of `PASSES` first and in its order."""
    pairs = list(itertools.product(layouts, densities))
    return [pair for pair in PASSES if pair in pairs] + [pair for pair in pairs if pair not in PASSES]


def layer_cells(
    layouts: Sequence[str], densities: Sequence[float], modes: Sequence[str], batch: int | None = None
) -> list[LayerCell]:
    """Return the cells of the cases that count in the means; modes are innermost, because they share a reference.

    Args:
        layouts: Memory formats.
        densities: Shares of the switches that are on.
        modes: Of `MODES`.
        batch: N; by default that of `BATCHES`.
    """
    cases = [case for case in CASES if case.C_in >= MIN_MEAN_CHANNELS]
    return [
        LayerCell(Cell(case, batch or BATCHES[case.network], density, "in", layout), mode)
        for layout, density in passes(layouts, densities)
        for case in cases
        for mode in modes
    ]


def step_cells(
    layouts: Sequence[str], densities: Sequence[float], modes: Sequence[str], batch: int | None = None
) -> list[StepCell]:
    """Return the cells of whole steps; arguments as in `layer_cells`."""
    return [
        StepCell(batch or BATCHES["resnet26"], density, layout, mode)
        for layout, density in passes(layouts, densities)
        for mode in modes
    ]
