"""Devices of the CPU to verify, with families that misbehave on purpose, and a cache folder for each test."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bap_kernels import _C, settings
from bap_kernels.verify import trigger
from bap_kernels.verify.store import Store
from bap_kernels.verify.subject import Subject

ROOT = Path(__file__).resolve().parents[2]
INDEX = 77


def subject(*behaviours: str, device: str = "CpuDevice", checks: str = "checks", **facts: str) -> Subject:
    """A device with a family for each behaviour."""
    return Subject(
        INDEX,
        {"gpu": "simulated", **facts},
        tuple(f"x/{behaviour}/float32" for behaviour in behaviours),
        {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")])},
        f"tests.verify.devices:{device}",
        f"tests.verify.misbehaving:{checks}",
    )


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The cache folder; afterwards no device has verdicts."""
    folder = tmp_path / "cache"
    changed = dataclasses.replace(settings.settings, cache_dir=folder, verify="1")
    for module in (settings, trigger, sys.modules["bap_kernels.verify"]):
        monkeypatch.setattr(module, "settings", changed)
    monkeypatch.setenv("TEST_VERIFY_FOLDER", str(tmp_path))
    yield folder
    _C.set_verdicts(INDEX, {})


@pytest.fixture
def store(cache: Path) -> Store:
    return Store(cache)


@pytest.fixture
def as_later_process() -> Callable[[], None]:
    """Forgets what this process remembers, as a new one would."""
    from bap_kernels.verify import store as module

    return module._memory.clear
