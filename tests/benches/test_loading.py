"""The bench of loading: cached images are the decoded ones, and every state has a rate."""

from __future__ import annotations

from pathlib import Path

import pytest

from benches import loading

pytest.importorskip("sklearn")


def test_every_state_is_measured(tmp_path: Path) -> None:
    paths = loading.write_images(tmp_path, 32, 96, 72)
    rates = loading.measure(paths, 72, 64, 0, tmp_path / "cache")
    assert len(rates) == len(loading.STATES)
    assert min(rates) > 0


def test_too_few_images_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        loading.main(["--images", "8"])
    assert "--images: expected at least 32, got 8" in capsys.readouterr().err
