"""Benchmarks of whole networks on photographs, their logits checked against float64 before they are timed."""

from collections.abc import Callable
from typing import Any

import pytest

from benches.cases import BATCHES, DENSITIES, LAYOUTS
from benches.conftest import WholeBench
from benches.network_models import NetworkCell, network_cells
from benches.timers import Timed

VARIANTS = ("dense", "masked", "planned", "pruned", "native", "auto", "aten")
NAMES = ("network", "batch", "density", "layout", "variant")


@pytest.mark.parametrize(
    NAMES,
    [
        pytest.param(cell.network, cell.batch, cell.density, cell.layout, variant, id=f"{cell.id}-{variant}")
        for cell in network_cells(BATCHES, DENSITIES, LAYOUTS)
        for variant in VARIANTS
    ],
)
def test_network(
    benchmark: Any,
    network_bench: WholeBench,
    require_backend: Callable[[str], None],
    time_in_rounds: Callable[[Timed], None],
    network: str,
    batch: int,
    density: float,
    layout: str,
    variant: str,
) -> None:
    """Time one network."""
    require_backend(variant)
    cell = NetworkCell(network, batch, density, layout)
    prepared = network_bench.prepare(cell, [variant])[variant]
    if variant != "dense":
        error = network_bench.check(variant, prepared, cell, network_bench.logits(cell), None)
        benchmark.extra_info["max_error"] = error
    benchmark.group = cell.id
    benchmark.extra_info["seed"] = cell.seed
    time_in_rounds(prepared)
