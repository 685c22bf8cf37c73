"""Benchmarks of call overhead."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benches.overhead import CALLS, SAMPLES, VARIANTS, build_calls, check


@pytest.mark.parametrize("variant", VARIANTS)
def test_overhead(benchmark: Any, require_backend: Callable[[str], None], variant: str) -> None:
    """Time the call on a single pixel."""
    if variant != "conv2d":
        require_backend("auto")
    by_name = build_calls(torch.device("cpu"), torch.float32, ("conv2d", variant))
    benchmark.extra_info["max_error"] = check(by_name)[variant]
    benchmark.group = "overhead"
    benchmark.pedantic(by_name[variant], rounds=SAMPLES, iterations=CALLS, warmup_rounds=1)
