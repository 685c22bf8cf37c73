"""Every command, on a finished run."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from bap.cli.commands import app
from bap.config import Config, load_config
from bap.prune.layers import SwitchBank
from typer.testing import CliRunner


def _run(*arguments: str) -> dict:
    made = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert made.exit_code == 0, made.output
    return json.loads(made.stdout)


def test_commands(finished: Path, copy_of, tmp_path: Path) -> None:
    folder = copy_of(finished / "checkpoint")
    found = _run("eval", str(folder), "--domain", "digits", "--split", "val")
    assert list(found["accuracy"]) == ["digits"]
    assert found["split"] == "val"
    about = _run("info", str(folder))
    assert {row["domain"] for row in about["domains"]} == {"digits", "glyphs", "shapes"}
    assert about["cost"]["params"] > 0
    pruned = _run("prune", str(folder), "--out", str(tmp_path / "pruned"))
    assert pruned["after"]["weights"] < pruned["before"]["weights"]
    assert pruned["flops"] == 2 * round(pruned["after"]["flop"] * pruned["after"]["backbone_macs"])
    assert _run("eval", str(tmp_path / "pruned"), "-d", "digits", "--split", "val") == found
    (tmp_path / "a.json").write_text(json.dumps({"aircraft": 60.34, "svhn": 96.55}))
    scores = _run("scores", str(tmp_path / "a.json"), "--flop", "0.5")
    assert (scores["S_O_partial"], scores["coverage"]) == (1000, "2 of 10 domains")
    assert "S" not in scores
    assert _run("add-domain", str(folder), "signs", "-s", "epochs=1", "-s", "batch=16")["kept"] <= 0.5
    assert "report.md" in _run("report", str(finished), "--out", str(tmp_path / "report"))["report"]


def test_train_command_with_a_file_and_overrides(tiny: Config, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tiny.replace(epochs=1, domains=["digits", "signs"]).as_dict()))
    weights = _run("pretrain", "-c", str(path), "-o", str(tmp_path / "source"), "-s", "pretrain_epochs=1")
    assert weights["source"] == "digits"
    made = _run(
        "train", "-c", str(path), "-o", str(tmp_path / "run"), "-s", "beta=0.25", "-s", f"weights={weights['weights']}"
    )
    assert made["beta"] == 0.25
    resolved = load_config(tmp_path / "run" / "config.yaml")
    assert (resolved.budget.beta, resolved.model.weights, resolved.schedule.epochs) == (0.25, weights["weights"], 1)


def test_every_command_has_help() -> None:
    names = [
        "pretrain",
        "train",
        "prune",
        "speed",
        "eval",
        "add-domain",
        "info",
        "scores",
        "report",
        "study",
        "estimate",
        "demo",
    ]
    for name in names:
        made = CliRunner().invoke(app, [name, "--help"])
        assert made.exit_code == 0
        assert "Usage" in made.output
    assert SwitchBank.__doc__
