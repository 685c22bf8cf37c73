"""Benchmarks of training: forward and backward of single convolutions, and whole steps, checked before they are timed.

``-k "resnet26 and d50 and frozen"`` selects; the variants of one case are one group.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from benches.cases import DENSITIES, LAYOUTS
from benches.timers import Timed
from benches.training import layers, steps
from benches.training.cells import MODES, LayerCell, StepCell, layer_cells, step_cells


@pytest.fixture(autouse=True)
def _autograd() -> Iterator[None]:
    # The other benchmarks run in inference mode.
    with torch.inference_mode(False):
        yield


@pytest.fixture(scope="session")
def training_layers() -> layers.LayerBench:
    return layers.LayerBench(peaks=False)


@pytest.fixture(scope="session")
def training_steps() -> steps.StepBench:
    return steps.StepBench(peaks=False)


def _name(value: object) -> str:
    return value.id if isinstance(value, (LayerCell, StepCell)) else str(value)


@pytest.mark.parametrize("variant", layers.VARIANTS)
@pytest.mark.parametrize("cell", layer_cells(LAYOUTS, DENSITIES, MODES), ids=_name)
def test_layer(
    benchmark: Any,
    training_layers: layers.LayerBench,
    time_in_rounds: Callable[[Timed], None],
    cell: LayerCell,
    variant: str,
) -> None:
    """Time forward and backward of one variant on one convolution."""
    prepared = training_layers.layer(cell.cell).variant(variant, cell.mode)
    benchmark.extra_info["max_error"] = training_layers.check(variant, prepared, cell)
    benchmark.extra_info["seed"] = cell.cell.seed
    benchmark.group = cell.id
    time_in_rounds(prepared)


@pytest.mark.parametrize("variant", steps.VARIANTS)
@pytest.mark.parametrize("cell", step_cells(LAYOUTS, DENSITIES, MODES), ids=_name)
def test_step(
    benchmark: Any,
    training_steps: steps.StepBench,
    time_in_rounds: Callable[[Timed], None],
    cell: StepCell,
    variant: str,
) -> None:
    """Time whole steps of one network."""
    prepared = training_steps.prepare(cell, variant)
    if variant != "dense":
        benchmark.extra_info["max_error"] = training_steps.check(
            variant, prepared, cell, training_steps.reference(cell)
        )
    benchmark.extra_info["seed"] = cell.seed
    benchmark.group = cell.id
    time_in_rounds(prepared)
