"""Reports over one run and over several."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import torch
from bap.config import Config
from bap.data import Arrays, Domain
from bap.results.report import make_report, results_table
from bap.results.run import train_run


def test_report(finished: Path, tmp_path: Path) -> None:
    path = make_report([finished], tmp_path / "report")
    text = path.read_text()
    assert "| run | 0.5 | union | test |" in text
    for picture in ("kept.png", "curves.png", "accuracy_budget.png"):
        assert f"]({picture})" in text
        assert (path.parent / picture).read_bytes().startswith(b"\x89PNG")


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
