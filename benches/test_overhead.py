"""Benchmarks of what one call costs beside its work."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benches.overhead import BASELINES, CALLS, SAMPLES, calls, gated


@pytest.mark.parametrize("variant", BASELINES)
def test_overhead(benchmark: Any, require_backend: Callable[[str], None], variant: str) -> None:
    """Time the call on a single pixel."""
    if variant != "conv2d":
        require_backend("auto")
    made = calls(torch.device("cpu"), torch.float32, ("conv2d", variant))
    benchmark.extra_info["max_error"] = gated(made)[variant]
    benchmark.group = "overhead"
    benchmark.pedantic(made[variant], rounds=SAMPLES, iterations=CALLS, warmup_rounds=1)
