"""Studies go on where they stopped."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

from bap.config import Config
from bap.data import Domain
from bap.results.scores import score
from bap.results.study import study


def test_study_resumes(tiny: Config, suite: dict[str, Domain], tmp_path: Path) -> None:
    config = tiny.replace(epochs=1, pretrain_epochs=1, domains=["shapes", "digits"])
    said: list[str] = []
    study(config, tmp_path, (0.5,), (None,), (0, 1), True, said.append)
    assert len(said) == 2
    path = study(config, tmp_path, (0.5,), (None, "int"), (0, 1), True, said.append)
    assert len(said) == 4
    lines = path.read_text().splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("| 0.5 | none | test | 2 | ")
    assert lines[3].startswith("| 0.5 | int | test | 2 | ")
    rows = json.loads((tmp_path / "study.json").read_text())["rows"]
    assert [(row["seed"], row["sharing"]) for row in rows] == [(0, None), (0, "int"), (1, None), (1, "int")]
    table = list(csv.DictReader(io.StringIO((tmp_path / "study.csv").read_text())))
    assert len(table) == 8
    assert float(table[-1]["accuracy"]) == rows[-1]["accuracy"]["digits"]
    assert table[-1]["run"] == "int at 0.5, seed 1"
    tex = (tmp_path / "study.tex").read_text().splitlines()
    assert tex[4].startswith("0.5 & none & test & 2 & ")
    assert r" $\pm$ " in tex[4]
    mean = sum(row["mean_accuracy"] for row in rows if row["sharing"] == "int") / 2
    assert f"| {mean:.1f} ± " in lines[3]


def test_study_scores_cells_that_were_run_before_their_baseline(
    tiny: Config, suite: dict[str, Domain], tmp_path: Path
) -> None:
    config = tiny.replace(epochs=1, pretrain_epochs=1, domains=["shapes", "digits"])
    for baseline in (False, True):
        study(config, tmp_path, (0.5,), (None,), (0,), baseline, lambda line: None)
        (row,) = json.loads((tmp_path / "study.json").read_text())["rows"]
        assert ("scores" in row) == baseline
    whole = json.loads((tmp_path / "baseline_seed0.json").read_text())
    assert row["scores"]["S"] == score(row["accuracy"], whole)
