"""Reports over one run and over several."""

from __future__ import annotations

import csv
import io
import json
import warnings
from pathlib import Path

import pytest
import torch
from bap.config import Config
from bap.data import Arrays, Domain
from bap.results.pictures import overlap
from bap.results.report import _published, latex_table, make_report, result_cells, results_table
from bap.results.run import scored, train_run
from bap.results.scores import DECATHLON_BASELINE


def test_report(finished: Path, tmp_path: Path) -> None:
    path = make_report([finished], tmp_path / "report")
    text = path.read_text()
    assert "| run | 0.5 | union | test |" in text
    for picture in ("kept", "layers", "overlap", "curves", "budgets", "accuracy_budget"):
        picture = f"{picture}.png"
        assert f"]({picture})" in text
        assert (path.parent / picture).read_bytes().startswith(b"\x89PNG")
    results = json.loads((finished / "results.json").read_text())
    rows = list(csv.DictReader(io.StringIO((path.parent / "results.csv").read_text())))
    assert {row["domain"]: float(row["accuracy"]) for row in rows} == results["accuracy"]
    assert {row["domain"]: float(row["kept"]) for row in rows} == results["kept"]
    assert {(row["run"], row["beta"], row["sharing"], row["split"]) for row in rows} == {
        ("run", "0.5", "union", "test")
    }
    assert {float(row["params"]) for row in rows} == {results["cost"]["params"]}


def test_latex_escapes_what_it_must() -> None:
    run = {"beta": 0.5, "sharing": None, "accuracy": {"a_b": 50.0, "c&d": 75.0}, "mean_accuracy": 62.5}
    run |= {
        "cost": {"flop": 0.5, "exact_flop": 0.4, "params": 0.9},
        "union": 0.75,
        "intersection": 0.25,
        "split": "test",
    }
    lines = latex_table(*result_cells([("half_100%", run)])).splitlines()
    assert lines[0] == r"\begin{tabular}{llllrrrrrrrrr}"
    head, row = lines[2], lines[4]
    assert head.startswith(r"run & $\beta$ & sharing & split & a\_b & c\&d & mean & S & FLOP $\times$ &")
    assert (
        row == r"half\_100\% & 0.5 & none & test & 50.0 & 75.0 & 62.5 & -- & 0.500 & 0.400 & 0.900 & 0.750 & 0.250 \\"
    )
    assert len(lines[0].split("{")[2]) - 1 == head.replace(r"\&", "").count("&") + 1 == 13
    assert (lines[1], lines[3], *lines[5:]) == (r"\toprule", r"\midrule", r"\bottomrule", r"\end{tabular}")


def test_published_rows_stand_beside_a_whole_benchmark(finished: Path, copy_of, tmp_path: Path) -> None:
    folder = copy_of(finished)
    results = json.loads((folder / "results.json").read_text())
    accuracy = {name: value - 1 for name, value in DECATHLON_BASELINE.items()}
    protocol = {"data": "decathlon", "whole": True, "evaluated_on": "test"}
    results |= {"accuracy": accuracy, "kept": dict.fromkeys(accuracy, 0.5), "protocol": protocol}
    results |= scored(results, DECATHLON_BASELINE)
    (folder / "results.json").write_text(json.dumps(results))
    text = "\n".join(_published("decathlon", [("mine", results)]))
    rows = {line.split(" | ")[0].removeprefix("| "): line.split(" | ")[1:] for line in text.splitlines() if "|" in line}
    assert rows["Scratch"][:3] == ["1625", "[P]", "1627"]
    assert rows["Joint training, ResNet-26"][:5] == ["2866", "[P]", "2867", "1", "1"]
    # Only accuracies of URL are published as numbers: its S is computed, and has no mark of its own.
    assert rows["URL, ResNet-26"][:3] == ["–", "[P]", "3625"]
    assert rows["URL + parallel adapters, ResNet-26"][2] == "4005"
    assert rows["URL, ResNet-26"][5:7] == ["61.45", "74.35"]
    assert rows["BA2 beta=0.50"][1] == "[Q]"
    mine = rows["This: mine"]
    assert mine[0] == f"{results['scores']['S']:.0f}"
    assert mine[5] == f"{accuracy['imagenet12']:.2f}"


def test_overlap_by_sets() -> None:
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(4, 30, generator=generator) < 0.6
    masks[3] = False
    costs = torch.rand(30, generator=generator, dtype=torch.float64)
    found = overlap(masks, costs)
    sets = [{index for index in range(30) if mask[index]} for mask in masks.tolist()]
    for a, one in enumerate(sets):
        for b, two in enumerate(sets):
            either = sum(costs[index].item() for index in one | two)
            common = sum(costs[index].item() for index in one & two)
            assert found[a, b].item() == pytest.approx(common / either if either else 1.0)


def _domain(name: str) -> Domain:
    split = Arrays(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0, 1]))
    return Domain(name, ("x", "y"), {"train": split, "val": split, "test": split}, 8)


def test_a_report_over_runs_with_different_domains(tiny: Config, tmp_path: Path) -> None:
    config = tiny.replace(domains=[], epochs=1, batch=4)
    for folder, names in (("one", ("a", "b")), ("two", ("b", "c", "d"))):
        train_run(config, tmp_path / folder, domains={name: _domain(name) for name in names})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = make_report([tmp_path / "one", tmp_path / "two"], tmp_path / "report")
    rows = [line.split(" | ") for line in path.read_text().splitlines() if line.startswith("| ")]
    head = rows[0]
    assert head[4:9] == ["a", "b", "c", "d", "mean"]
    assert rows[1][6:8] == ["–", "–"]
    assert rows[1][8].endswith("(2 domains)")
    assert rows[2][4] == "–"
    assert rows[2][8].endswith("(3 domains)")
    text = results_table([("x", json.loads((tmp_path / "one" / "results.json").read_text()))])
    assert "domains)" not in text
