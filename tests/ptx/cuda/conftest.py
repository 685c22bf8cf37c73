"""Runs the CUDA backend as nvcc compiled it: its launchers on a stand-in runtime, its PTX in the executor.

These tests have a process of their own, which tests/ptx/test_cuda.py starts: the library is loaded when the package is
imported, and a process executes for one architecture, BAP_KERNELS_PTX_ARCH=80 or 90.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bap_kernels import _load
from bap_kernels.testing import TOLERANCES
from tests.kernel_contract import TF32

EXECUTED = hasattr(_load.cuda_library, "kernel_text")
ARCH = getattr(_load.cuda_library, "arch", 0)

# Faults that were put into a kernel: the kernel, what was wrong, and by what it was found.
FOUND: list[tuple[str, str, str]] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """A table of the faults."""
    if FOUND:
        terminalreporter.section("faults put into kernels")
        for row in FOUND:
            terminalreporter.write_line("| " + " | ".join(row) + " |")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "cuda" not in item.path.parts[-2:-1] or "ptx" not in item.path.parts:
            continue
        if not EXECUTED:
            item.add_marker(pytest.mark.skip(reason="runs in a process of its own: tests/ptx/test_cuda.py"))
        elif (only := item.get_closest_marker("arch")) and only.args[0] != ARCH:
            item.add_marker(pytest.mark.skip(reason=f"for sm_{only.args[0]}, and this process executes sm_{ARCH}"))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "arch(number): runs where that architecture is executed")


@pytest.fixture(autouse=True)
def _tf32(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernels have no other float32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    monkeypatch.setitem(TOLERANCES, torch.float32, TF32)
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    """Each test begins with one SM of the process's architecture, and leaves no kernel changed."""
    if not EXECUTED:
        yield
        return
    library = _load.cuda_library
    library.set_device()
    library.take_launches()
    yield
    library.set_device()
    library.set_options()
    library.restore_kernels()


@pytest.fixture
def device() -> Any:
    """The library."""
    return _load.cuda_library


@pytest.fixture(params=["large tiles", "small tiles"])
def _tiles(request: pytest.FixtureRequest, _settings: None) -> None:
    """Both choices of tiles: few SMs take large ones, many take small ones."""
    _load.cuda_library.set_device(1 if request.param == "large tiles" else 1_000_000)
