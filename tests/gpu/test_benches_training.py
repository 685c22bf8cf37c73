"""The study of training on a GPU: every variant is checked, timed by events, and its peak measured."""

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
    by_variant = {
        row.variant: row for row in bench.rows(StepCell(4, 0.5, "nchw", "trained"), steps.VARIANTS, seconds=0)
    }
    assert tuple(by_variant) == steps.VARIANTS
    for row in by_variant.values():
        assert row.device == "cuda"
        assert row.forward_s
        assert row.backward_s
        assert row.saved_bytes
        # Bytes saved for the backward are allocated at the peak.
        assert row.peak_bytes
        assert row.peak_bytes > row.saved_bytes


def test_rows_of_a_layer() -> None:
    case = next(case for case in CASES if case.shape == "7x7-512-512-k3s1")
    bench = layers.LayerBench(device=torch.device("cuda"))
    cell = LayerCell(Cell(case, 8, 0.5, "in", "nchw"), "trained")
    by_variant = {row.variant: row for row in bench.rows(cell, layers.VARIANTS, seconds=0)}
    assert tuple(by_variant) == layers.VARIANTS
    assert all(row.device == "cuda" and row.peak_bytes and row.forward_s for row in by_variant.values())
