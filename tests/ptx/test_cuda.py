"""Starts the processes that execute the CUDA backend as compiled; see tests/ptx/cuda."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ptx.build import cuda_library, cuda_obstacle

ROOT = Path(__file__).resolve().parents[2]
OBSTACLE = cuda_obstacle()
pytestmark = pytest.mark.skipif(OBSTACLE is not None, reason=str(OBSTACLE))


def start(arch: int, *arguments: str) -> str:
    """Runs pytest in a process that executes an architecture, and returns what it printed."""
    environment = {**os.environ, "BAP_KERNELS_CUDA_LIBRARY": str(cuda_library()), "BAP_KERNELS_PTX_ARCH": str(arch)}
    environment.pop("PYTEST_XDIST_WORKER", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-rs", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("arch", [80, 90])
def test_a_sample(arch: int) -> None:
    assert " passed" in start(arch, "tests/ptx/cuda", "--part=1/120")


@pytest.mark.beyond_the_sample
@pytest.mark.parametrize("part", range(1, 17))
@pytest.mark.parametrize("arch", [80, 90])
def test_everything(arch: int, part: int) -> None:
    assert " passed" in start(arch, "tests/ptx/cuda", "-m", "not sample", f"--part={part}/16")
