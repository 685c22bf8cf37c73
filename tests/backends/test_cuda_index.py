"""Index arithmetic of the CUDA kernels, compiled for the host: each function of cuda_index/check_*.cpp is a test."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CXX = os.environ.get("CXX") or shutil.which("g++")
CHECKS = (
    *(
        "forward_axes",
        "gradient_axes",
        "tile_order",
        "row_places",
        "quotients",
        "steps",
        "lists",
        "copies",
        "banks",
        "stages",
    ),
    *("parts", "choices", "runs"),
    *("halo_places", "halo_taps", "halo_staging", "halo_banks", "halo_limits", "halo_choice"),
    "descriptors",
    "transposed_descriptors",
)

pytestmark = pytest.mark.skipif(CXX is None, reason="there is no C++ compiler")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("index") / "check_index"
    command = [*str(CXX).split(), "-std=c++20", "-O1", "-I", str(ROOT / "csrc")]
    sources = sorted(map(str, Path(__file__).with_name("cuda_index").glob("*.cpp")))
    subprocess.run([*command, *sources, "-o", str(path)], check=True, timeout=300)
    return path


def test_program_has_every_check(program: Path) -> None:
    process = subprocess.run([program], capture_output=True, text=True)
    assert process.returncode == 2
    assert sorted(process.stdout.split()) == sorted(CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_check_passes(program: Path, name: str) -> None:
    process = subprocess.run([program, name], capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stdout
