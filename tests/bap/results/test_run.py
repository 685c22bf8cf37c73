"""What a run leaves in its folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bap.config import Config, load_config
from bap.data import Domain
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


def test_dense_teacher_is_trained_first(tiny: Config, suite: dict[str, Domain], tmp_path: Path) -> None:
    config = tiny.replace(epochs=1, teacher="dense", distill_weight=0.5, give_back=True)
    with pytest.raises(ValueError, match=r"expected a folder, where the teacher 'dense' is trained, got None"):
        train_run(config, None, domains=suite)
    run = tmp_path / "run"
    train_run(config, run, domains=suite)
    dense, taught = load_config(run / "dense" / "config.yaml"), load_config(run / "config.yaml")
    assert taught.distill.teacher == str(run / "dense" / "checkpoint")
    assert (dense.distill.teacher, dense.budget.beta, dense.budget.give_back) == (None, 1.0, False)
    assert dense.optimiser.lr_switch == 0
    results = json.loads((run / "dense" / "results.json").read_text())
    assert set(results["kept"].values()) == {1.0}
    # A folder with a run is refused before anything is trained.
    written = (run / "dense" / "results.json").stat().st_mtime_ns
    with pytest.raises(ValueError, match=r"to have no run, got one"):
        train_run(config.replace(seed=1), run, domains=suite)
    # Going on does not train the teacher again, and equals a run that names it.
    train_run(config, run, resume=True, domains=suite)
    assert (run / "dense" / "results.json").stat().st_mtime_ns == written
    named = train_run(config.replace(teacher=str(run / "dense" / "checkpoint")), tmp_path / "named", domains=suite)
    assert named["accuracy"] == json.loads((run / "results.json").read_text())["accuracy"]


def test_dense_teacher_of_weight_0_is_not_trained(tiny: Config, suite: dict[str, Domain], tmp_path: Path) -> None:
    config = tiny.replace(epochs=1, teacher="dense", distill_weight=0.0)
    results = train_run(config, tmp_path, domains=suite)
    assert not (tmp_path / "dense").exists()
    assert load_config(tmp_path / "config.yaml").distill.teacher is None
    plain = train_run(config.replace(teacher=None), None, domains=suite)
    assert results["accuracy"] == plain["accuracy"]
