"""Benchmarks of what one call costs beside its work."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benches.overhead import CALLS, PEERS, SAMPLES, calls, gated


@pytest.mark.parametrize("peer", PEERS)
def test_overhead(benchmark: Any, require_backend: Callable[[str], None], peer: str) -> None:
    """Time the call on a single pixel."""
    if peer != "conv2d":
        require_backend("auto")
    made = calls(torch.device("cpu"), torch.float32, ("conv2d", peer))
    benchmark.extra_info["max_error"] = gated(made)[peer]
    benchmark.group = "overhead"
    benchmark.pedantic(made[peer], rounds=SAMPLES, iterations=CALLS, warmup_rounds=1)
