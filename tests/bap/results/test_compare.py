"""Baselines at the cost of what they are compared with, and differences paired by seed."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import torch
from bap.config import Config, load_config
from bap.data import Domain
from bap.prune.counting import count
from bap.prune.layers import SwitchBank
from bap.results.compare import comparison_table, matched_masks, narrow_options, paired_difference
from bap.results.study import StudyGrid, study
from bap.train.network import switched_network

import bap_kernels as bk

OPTIONS = {"widths": [8, 12, 16], "blocks": [1, 1, 1]}
EXAMPLE = torch.zeros(1, 3, 32, 32)


@pytest.mark.parametrize("match", ["flop", "exact_flop"])
@pytest.mark.parametrize("shared", [True, False])
def test_masks_are_matched_from_below(match: str, shared: bool) -> None:
    model = switched_network(Config(model_options=OPTIONS), {"a": 3, "b": 2})
    bank = SwitchBank(model)
    generator = torch.Generator().manual_seed(0)
    scores = {name: torch.rand(sum(bank.sizes), generator=generator, dtype=torch.float64) for name in ("a", "b")}
    if shared:
        scores = dict.fromkeys(scores, scores["a"])
    masks = matched_masks(model, scores, EXAMPLE, match, 0.55)
    assert torch.equal(masks["a"], masks["b"]) == shared
    # Nothing was changed in the network itself.
    assert bool(bank.masks().all())
    for name, mask in masks.items():
        bank.write(name, torch.where(mask, 1e-2, 0.0))
        # The highest scores are on, but for channels that the last bit of room is for.
        strongest = scores[name].argsort(descending=True)[: int(mask.sum()) // 2]
        assert mask[strongest].float().mean() > 0.8
    found = getattr(count(model, EXAMPLE), match)
    assert 0.45 < found <= 0.55
    whole = matched_masks(model, scores, EXAMPLE, match, 1.0)
    assert all(bool(mask.all()) for mask in whole.values())
    with pytest.raises(ValueError, match=r"to leave room for 1 channels of every layer, got 0.001"):
        matched_masks(model, scores, EXAMPLE, match, 0.001)


def test_narrow_networks_are_as_wide_as_the_target_allows() -> None:
    config = Config(model_options=OPTIONS)

    def macs(widths: list[int]) -> int:
        model = switched_network(config.replace(model_options={**OPTIONS, "widths": widths}), {"a": 2})
        bk.set_domain(model, "a")
        return count(model, EXAMPLE).backbone_macs

    options = narrow_options(config, 32, 0.5)
    assert options is not None
    assert options["blocks"] == [1, 1, 1]
    assert macs(options["widths"]) <= 0.5 * macs(OPTIONS["widths"])
    assert macs([width + 1 for width in options["widths"]]) > 0.5 * macs(OPTIONS["widths"])
    assert narrow_options(config, 32, 1.0) == OPTIONS
    # The backbone's own widths, where no option sets others.
    whole = narrow_options(Config(model="wrn28_4", model_options={"depth": 10}), 32, 1.0)
    assert whole == {"depth": 10, "widths": [64, 128, 256]}
    assert narrow_options(Config(model="vgg16"), 32, 0.5) is None
    assert narrow_options(config, 32, 1e-6) is None


def test_differences_are_paired_by_seed() -> None:
    mean, half, seeds = paired_difference({0: 61.0, 1: 64.0, 2: 66.0, 7: 0.0}, {0: 60.0, 1: 60.0, 2: 65.0})
    # Differences 1, 4, 1: mean 2, standard deviation sqrt(3), t(.975, 2) = 4.30265.
    assert (mean, seeds) == (2.0, 3)
    assert half == pytest.approx(4.302653 * math.sqrt(3) / math.sqrt(3))
    assert paired_difference({0: 1.0}, {0: 3.0}) == (-2.0, None, 1)
    mean, half, seeds = paired_difference({0: 1.0}, {1: 3.0})
    assert math.isnan(mean)
    assert (half, seeds) == (None, 0)
    common = {"beta": 0.5, "flop": 0.5, "exact_flop": 0.4, "params": 1.0, "seconds": 2.0}
    rows = [{**common, "seed": 0, "method": "union", "match": "reference", "accuracy": 60.0}]
    rows += [{**common, "seed": seed, "method": "narrow", "match": "exact_flop", "accuracy": 62.0} for seed in (0, 5)]
    lines = comparison_table(rows).splitlines()
    assert lines[2].startswith("| 0.5 | union | reference | 1 | 60.00 | – |")
    assert lines[3] == "| 0.5 | narrow | exact flop | 2 | 62.00 | +2.00 (one seed) | 0.500 | 0.400 | 1.000 | 2 |"


def test_a_study_runs_its_baselines_once(tiny: Config, suite: dict[str, Domain], tmp_path: Path) -> None:
    config = tiny.replace(epochs=1, pretrain_epochs=1, domains=["shapes", "digits"])
    names = ("dense", "narrow", "shared-mask", "domain-masks", "magnitude", "alone")
    said: list[str] = []

    def run() -> Path:
        grid = StudyGrid((0.5,), ("union",), (0,), False, names, ("flop",))
        return study(config, tmp_path, grid, said.append)

    text = run().read_text()
    rows = json.loads((tmp_path / "study.json").read_text())["compared"]
    assert [row["method"] for row in rows] == ["union", "dense", "alone", *names[1:5]]
    reference = rows[0]
    for row in rows:
        assert row["seconds"] > 0
        if row["match"] == "flop":
            assert 0.6 * reference["flop"] < row["flop"] <= reference["flop"]
    dense, alone, narrow, shared, apart = rows[1], rows[2], rows[3], rows[4], rows[5]
    assert (dense["flop"], alone["flop"], alone["params"]) == (1.0, 1.0, 2.0)
    assert narrow["params"] < 1
    assert narrow["flop"] == narrow["exact_flop"]
    assert shared["params"] < apart["params"]
    assert "| 0.5 | union | reference | 1 |" in text
    assert "(one seed)" in text
    assert "0.5 & narrow & flop & 1 & " in (tmp_path / "compared.tex").read_text()
    stored = json.loads((tmp_path / "study.json").read_text())["compared"]
    with open(tmp_path / "compared.csv", newline="") as file:
        written = [(row["method"], row["match"], float(row["accuracy"])) for row in csv.DictReader(file)]
    assert written == [(row["method"], row["match"], row["accuracy"]) for row in stored]
    count_of_runs = len(said)
    run()
    assert len(said) == count_of_runs
    assert json.loads((tmp_path / "study.json").read_text())["compared"] == rows
    # The dense network is the teacher of its own seed, and is trained once.
    taught = config.replace(teacher="dense", distill_weight=0.5)
    grid = StudyGrid((0.5,), ("union",), (0,), False, ("dense", "narrow-taught"), ("flop",))
    study(taught, tmp_path / "taught", grid, said.append)
    first, second, third = json.loads((tmp_path / "taught" / "study.json").read_text())["compared"]
    assert first["seconds"] > second["seconds"] > 0
    settings = load_config(tmp_path / "taught" / "beta0.5_union_seed0" / "config.yaml")
    assert settings.distill.teacher == str(tmp_path / "taught" / "dense_seed0" / "checkpoint")
    assert load_config(tmp_path / "taught" / "dense_seed0" / "config.yaml").distill.weight == 0
    (narrow_run,) = (tmp_path / "taught").glob("narrow_*_taught_seed0")
    assert load_config(narrow_run / "config.yaml").distill == settings.distill
    assert third["method"] == "narrow-taught"
    assert third["seconds"] > second["seconds"]
    assert third["flop"] <= first["flop"]
    with pytest.raises(ValueError, match="the baseline 'narrow-taught' beside the method or a variant that learns"):
        study(config, tmp_path / "untaught", grid)
    with pytest.raises(ValueError, match=r"to be among \['dense', .* got \['dens'\]"):
        StudyGrid(compare=("dens",))
