"""A tiny suite and settings with which a run takes a second."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bap.cli import main
from bap.config import Config
from bap.data import Domain, builtin_suite
from bap.results.run import train_run

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


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, settings: dict) -> Path:
    """A finished run; tests that write take a copy."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    config = Config(
        **{**settings, "epochs": 6, "sharing": "union", "relaxed": True, "sharing_weight": 4.0, "settle": 0.7}
    )
    train_run(config, folder, baseline={"shapes": 60.0, "digits": 60.0, "glyphs": 60.0})
    return folder


@pytest.fixture
def bap(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str, str]]:
    """Runs a command in this process: exit status, output and errors."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["bap", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        output, errors = capsys.readouterr()
        return int(caught.value.code or 0), output, errors

    return run
