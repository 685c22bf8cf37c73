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
from bap_kernels.testing import TOLERANCES
from tests.kernel_contract import TF32
from tests.simulate.device import set_device


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = "runs in a process of its own: make test-simulate"
    for item in items:
        if not cuda_library_is_simulated and "simulate" in item.path.parts:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _tf32(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernels have no other float32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    monkeypatch.setitem(TOLERANCES, torch.float32, TF32)
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(autouse=True)
def _device() -> None:
    set_device()


@pytest.fixture(params=["large tiles", "small tiles"])
def _tiles(request: pytest.FixtureRequest, _device: None) -> None:
    """Both choices of tiles: few SMs take large ones, many take small ones."""
    set_device(sm_count=1 if request.param == "large tiles" else 1_000_000)
