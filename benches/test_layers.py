"""Benchmarks of every case with every variant, each checked against float64 before it is timed.

``--benchmark-group-by=group`` (the default) compares the variants of one case; ``-k "resnet26 and d50 and native"``
selects.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from benches import baselines
from benches.cases import Cell, full_cells
from benches.conftest import LayerBench
from benches.timers import Timed

BACKENDS = ("native", "auto", "aten")
CELLS = {cell.id: cell for cell in full_cells()}
NAMES = ("network", "batch", "shape", "density", "lists", "layout", "variant")


def parameters() -> Iterator[Any]:
    """Yield every cell with every variant that differs from the others."""
    for cell in CELLS.values():
        for variant in (*baselines.BASELINES, *BACKENDS):
            if baselines.applies(variant, cell):
                values = (
                    cell.case.network,
                    cell.batch,
                    cell.case.shape,
                    cell.density,
                    cell.lists,
                    cell.layout,
                    variant,
                )
                yield pytest.param(*values, id=f"{cell.id}-{variant}")


def cell_of(network: str, batch: int, shape: str, density: float, lists: str, layout: str) -> Cell:
    """Return the cell with these settings."""
    return CELLS[f"{network}-b{batch}-{shape}-d{density * 100:.0f}-{lists}-{layout}"]


@pytest.mark.parametrize(NAMES, list(parameters()))
def test_layer(
    benchmark: Any,
    layer_bench: LayerBench,
    require_backend: Callable[[str], None],
    time_in_rounds: Callable[[Timed], None],
    network: str,
    batch: int,
    shape: str,
    density: float,
    lists: str,
    layout: str,
    variant: str,
) -> None:
    """Time one variant on one cell."""
    require_backend(variant)
    cell = cell_of(network, batch, shape, density, lists, layout)
    problem, reference = layer_bench.tensors(cell)
    prepared = layer_bench.prepare(variant, problem)
    error = layer_bench.check(variant, prepared, problem, reference)
    flop, moved = problem.work(dense=variant == "dense")
    benchmark.group = cell.id
    benchmark.extra_info.update(
        candidate=prepared.candidate,
        max_error=error,
        gflop=flop * 1e-9,
        bytes=moved,
        seed=cell.seed,
        K_in=cell.K_in,
        K_out=cell.K_out,
        inputs="rotated" if problem.rotated else "warm",
    )
    time_in_rounds(prepared)
