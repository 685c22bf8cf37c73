"""What a run leaves in its folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bap.config import load_config
from bap.results.run import train_run


def test_files_of_a_run(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    assert set(results["accuracy"]) == {"shapes", "digits", "glyphs"}
    assert all(value <= 0.5 for value in results["kept"].values())
    assert results["cost"]["params"] < results["cost"]["flop"] + 1
    assert results["scores"]["S_O"] == pytest.approx(results["scores"]["S"] / results["cost"]["flop"])
    assert load_config(finished / "config.yaml").sharing.loss == "union"
    assert {str(path.relative_to(finished / "checkpoint")) for path in (finished / "checkpoint").rglob("*.*")} == {
        "config.json",
        "model.safetensors",
        *(
            f"domains/{name}/{file}"
            for name in results["accuracy"]
            for file in ("domain.safetensors", "domain_config.json")
        ),
    }
    with pytest.raises(ValueError, match=r"to have no run, got one. Hint: --resume"):
        train_run(load_config(finished / "config.yaml"), finished)


def test_nothing_is_pickled(finished: Path) -> None:
    for path in finished.rglob("*.safetensors"):
        assert path.read_bytes()[8:9] == b"{"
    assert not [path for path in finished.rglob("*") if path.suffix in (".pt", ".pth", ".pkl", ".bin")]
