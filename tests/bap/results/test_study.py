"""Studies go on where they stopped."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from bap.config import Config, load_config
from bap.data import Domain
from bap.results.scores import score
from bap.results.study import StudyGrid, study
from bap.train.run_log import read_results


def test_study_resumes(tiny: Config, suite: dict[str, Domain], tmp_path: Path) -> None:
    config = tiny.replace(epochs=1, pretrain_epochs=1, domains=["shapes", "digits"])
    said: list[str] = []
    study(config, tmp_path, StudyGrid((0.5,), (None,), (0, 1)), said.append)
    assert len(said) == 2
    path = study(config, tmp_path, StudyGrid((0.5,), (None, "int"), (0, 1)), said.append)
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
        study(config, tmp_path, StudyGrid((0.5,), (None,), (0,), baseline), lambda line: None)
        (row,) = json.loads((tmp_path / "study.json").read_text())["rows"]
        assert ("scores" in row) == baseline
    whole = json.loads((tmp_path / "baseline_seed0.json").read_text())
    assert row["scores"]["S"] == score(row["accuracy"], whole)


def test_variants_stand_beside_the_method(tiny: Config, suite: dict[str, Domain], tmp_path: Path) -> None:
    config = tiny.replace(epochs=2, pretrain_epochs=1, domains=["shapes", "digits"])
    said: list[str] = []
    variants = {
        "annealed": ["anneal=cubic", "give_back=true", "anneal_until=0.5"],
        "taught": ["teacher=dense", "distill_weight=0.5", "sharing=int"],
    }
    grid = StudyGrid((0.5,), (None, "union"), (0,), False, variants=variants)
    text = study(config, tmp_path, grid, said.append).read_text()
    # The dense network is trained for the variant that learns from it.
    names = ["beta0.5_none", "beta0.5_union", "beta0.5_annealed", "dense", "beta0.5_taught"]
    assert [line.split(":")[0] for line in said] == [f"{name}_seed0" for name in names]
    annealed, taught = (load_config(tmp_path / f"beta0.5_{name}_seed0" / "config.yaml") for name in variants)
    assert (annealed.budget.anneal, annealed.sharing.loss, annealed.distill.weight) == ("cubic", "union", 0)
    assert (taught.budget.anneal, taught.sharing.loss, taught.distill.weight) == (None, "int", 0.5)
    assert taught.distill.teacher == str(tmp_path / "dense_seed0" / "checkpoint")
    first, second = text.split("\n\n")[:2]
    assert [line.split(" | ")[1] for line in first.splitlines()[2:]] == ["none", "union", "annealed", "taught"]
    rows = json.loads((tmp_path / "study.json").read_text())["compared"]
    assert [(row["method"], row["match"]) for row in rows] == [
        ("union", "reference"),
        ("annealed", "budget"),
        ("taught", "budget"),
    ]
    difference = rows[1]["accuracy"] - rows[0]["accuracy"]
    assert f"| 0.5 | annealed | budget | 1 | {rows[1]['accuracy']:.2f} | {difference:+.2f} (one seed) |" in second
    # A taught run needs the dense one's training, too.
    dense = read_results(tmp_path / "dense_seed0")["training_seconds"]
    assert rows[2]["seconds"] == dense + read_results(tmp_path / "beta0.5_taught_seed0")["training_seconds"]
    # Another setting of a finished variant is another run.
    other = replace(grid, variants={"annealed": ["anneal=linear", "anneal_until=0.5"]})
    with pytest.raises(ValueError, match=r"budget\.anneal"):
        study(config, tmp_path, other, said.append)


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ({"union": ["anneal=cubic"]}, r"the name of a variant .* got 'union'"),
        ({"a_b": []}, r"the name of a variant .* got 'a_b'"),
        ({"": []}, r"the name of a variant .* got ''"),
        ({"small": ["beta=0.1", "seed=3"]}, r"got budget\.beta, run\.seed in 'small'"),
        ({"wide": ["model_options={}"]}, r"got model\.options in 'wide'"),
        ({"odd": ["anneal"]}, r"overrides like name=value, got 'anneal'"),
        ({"odd": ["anneel=cubic"]}, r"the name of a setting, got 'anneel'"),
    ],
)
def test_impossible_variants_raise(variants: dict[str, list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StudyGrid(variants=variants)


def test_variants_are_checked_before_training(tiny: Config, tmp_path: Path) -> None:
    grid = StudyGrid((0.5,), (None,), (0,), variants={"odd": ["anneal=square"]})
    with pytest.raises(ValueError, match=r"square"):
        study(tiny, tmp_path / "new", grid)
    assert not (tmp_path / "new").exists()
