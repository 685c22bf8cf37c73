"""A tiny suite and settings with which a run takes a second."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bap.config import Config
from bap.data import Domain, builtin_suite

TINY: dict[str, Any] = {
    "domains": ["shapes", "digits", "glyphs"],
    "images": 100,
    "model_options": {"widths": [8, 8, 16], "blocks": [1, 1, 1]},
    "epochs": 4,
    "batch": 32,
    "lr_switch": 2e-3,
    "lr_norm": 1e-2,
    "lr_head": 5e-2,
    "multiplier_rate": 1.0,
    "threads": 1,
    "backend": "aten",
}


@pytest.fixture(scope="session")
def settings() -> dict[str, Any]:
    return TINY


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """Copies a folder, so that a test can change it."""
    return lambda folder: Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.fixture
def tiny() -> Config:
    return Config(**TINY)


@pytest.fixture(scope="session")
def suite() -> dict[str, Domain]:
    return builtin_suite(TINY["domains"], TINY["images"])
