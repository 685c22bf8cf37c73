"""The study of training on a GPU: every variant is gated, timed by events, and its peak measured."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("sklearn")

from benches.cases import CASES, Cell
from benches.training import layers, steps
from benches.training.cells import LayerCell, StepCell

pytestmark = pytest.mark.gpu


def test_rows_of_a_step() -> None:
    bench = steps.StepBench(device=torch.device("cuda"))
    made = {row.variant: row for row in bench.rows(StepCell(4, 0.5, "nchw", "trained"), steps.BASELINES, seconds=0)}
    assert tuple(made) == steps.BASELINES
    for row in made.values():
        assert row.device == "cuda"
        assert row.forward_s
        assert row.backward_s
        assert row.saved_bytes
        # What is kept for the backward is there at the peak.
        assert row.peak_bytes
        assert row.peak_bytes > row.saved_bytes


def test_rows_of_a_layer() -> None:
    case = next(one for one in CASES if one.shape == "7x7-512-512-k3s1")
    bench = layers.LayerBench(device=torch.device("cuda"))
    cell = LayerCell(Cell(case, 8, 0.5, "in", "nchw"), "trained")
    made = {row.variant: row for row in bench.rows(cell, layers.BASELINES, seconds=0)}
    assert tuple(made) == layers.BASELINES
    assert all(row.device == "cuda" and row.peak_bytes and row.forward_s for row in made.values())
