"""Runs the text of the CUDA kernels on the host, on CPU tensors; these tests have a process of their own.

Without BAP_KERNELS_CUDA_LIBRARY they are skipped: the library is loaded when the package is imported. The simulation is
described in csrc/backends/cuda/simulate/simulated_block.h; it raises where a block would read or overwrite shared
memory too early.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bap_kernels._load import cuda_library_is_simulated
from tests.simulate.device import set_device


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = "runs in a process of its own: make test-simulate"
    for item in items:
        if not cuda_library_is_simulated and "simulate" in item.path.parts:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _full_float32() -> Iterator[None]:
    # The table of tolerances is that of float32 products, not of TF32.
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(autouse=True)
def _device() -> None:
    set_device()


@pytest.fixture(params=["large tiles", "small tiles"])
def _tiles(request: pytest.FixtureRequest, _device: None) -> None:
    """Both choices of tiles: few SMs take large ones, many take small ones."""
    set_device(sm_count=1 if request.param == "large tiles" else 1_000_000)
