"""Executes compiled PTX on the CPU: all of it with `make test-ptx`, a sample where the compilers are there without."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

EVERYTHING = os.environ.get("BAP_KERNELS_TEST_PTX") == "1"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "beyond_the_sample: runs with make test-ptx only")
    config.addinivalue_line("markers", "sample: of tests in a process of their own, those of the normal run")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason="beyond the sample: make test-ptx")
    for item in items:
        if not EVERYTHING and item.get_closest_marker("beyond_the_sample"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _full_float32() -> Iterator[None]:
    # The table of tolerances is that of float32 products, not of TF32.
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before
