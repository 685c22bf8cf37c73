"""Published scores and parameter counts, reproduced."""

from __future__ import annotations

import pytest
import torch
from bap.models import build
from bap.prune.counting import adapters_params, backbone_params, count, masks_params
from bap.results.published import DECATHLON_ROWS, PIGGYBACK, SCRATCH, SKETCH_ROWS
from bap.results.report import _published, results_table
from bap.results.run import scored
from bap.results.scores import DECATHLON_BASELINE, SKETCH_BASELINE, domain_scores, score, scores, shown_score

import bap_kernels as bk

DOMAINS = [f"domain{number}" for number in range(10)]


@pytest.mark.parametrize(
    ("accuracy", "expected"), [(DECATHLON_BASELINE, 2500), (SCRATCH, 1625), (PIGGYBACK, 2838)], ids=str
)
def test_decathlon_scores(accuracy: dict[str, float], expected: float) -> None:
    # Accuracies are printed with two digits, which moves S by up to 0.6 %.
    assert score(accuracy, DECATHLON_BASELINE) == pytest.approx(expected, rel=6e-3)


def test_imagenet_to_sketch_baseline_scores_250_each() -> None:
    assert score(SKETCH_BASELINE, SKETCH_BASELINE) == 1500
    assert set(domain_scores(SKETCH_BASELINE, SKETCH_BASELINE).values()) == {250.0}


def test_scores_of_perfect_and_chance_accuracy() -> None:
    assert score(dict.fromkeys(DECATHLON_BASELINE, 100.0), DECATHLON_BASELINE) == 10_000
    # Twice the baseline's error or more gives nothing.
    assert domain_scores({"a": 60.0, "b": 59.0}, {"a": 80.0, "b": 80.0}) == {"a": 0.0, "b": 0.0}
    assert domain_scores({"a": 90.0}, {"a": 80.0})["a"] == pytest.approx(1000 * 0.75**2)
    assert domain_scores({"a": 90.0}, {"a": 80.0}, gamma=1)["a"] == pytest.approx(750)


def test_scores_per_operation_and_parameter() -> None:
    made = scores(PIGGYBACK, DECATHLON_BASELINE, flop=1.0, params=masks_params(9))
    assert made.s_o == made.s
    assert made.s_p == pytest.approx(2838 / 1.28, rel=6e-3)
    assert made.combined == made.s_o * made.s_p
    # BA² at β = .5 [Q]: 2999 at FLOP .543.
    half = next(row for row in DECATHLON_ROWS if row.method == "BA2 beta=0.50")
    assert half.s / half.flop == pytest.approx(5523, abs=1)
    assert {row.mark for row in DECATHLON_ROWS + SKETCH_ROWS} == {"P", "Q"}


def test_params_of_piggyback_and_adapters() -> None:
    assert round(masks_params(9), 2) == 1.28
    # Series and parallel residual adapters are published with 2 times the parameters.
    assert adapters_params(build("resnet26", 1000), 9) == pytest.approx(2, abs=0.05)
    assert adapters_params(build("wrn28_4", 1000), 9) == pytest.approx(2, abs=0.05)


def test_switches_and_norms_of_ten_domains_are_those_of_ba2() -> None:
    model = bk.nn.switch_(build("wrn28_4", 10), DOMAINS, heads=dict.fromkeys(DOMAINS, 10))
    cost = count(model, torch.zeros(1, 3, 64, 64))
    # 1.03 in the published table at β = 1 [Q]; nine more batch norms and ten times one bit for each channel.
    assert cost.params == pytest.approx(1.03, abs=0.01)
    assert cost.backbone_params == backbone_params(build("wrn28_4", 10))
    assert cost.flop == cost.exact_flop == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: score({"a": 50.0}, {"b": 50.0}), r"expected `baseline` to have 'a', got \['b'\]"),
        (lambda: score({"a": 101.0}, {"a": 50.0}), "from 0 to 100, got 101.0 for 'a'"),
        (lambda: score({"a": 50.0}, {"a": 100.0}), "below 100, got 100.0 for 'a'"),
        (lambda: scores({"a": 50.0}, {"a": 50.0}, 0.0, 1.0), "`flop` to be positive, got 0.0"),
        (lambda: scores({"a": 50.0}, {"a": 50.0}, 1.0, -1.0), "`params` to be positive, got -1.0"),
    ],
)
def test_errors(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_published_scores_are_those_that_were_printed() -> None:
    rows = {row.method: row for row in (*DECATHLON_ROWS, *SKETCH_ROWS)}
    assert (rows["Scratch"].s, rows["Scratch"].mark, round(rows["Scratch"].recomputed)) == (1625, "P", 1627)
    assert (rows["Piggyback"].s, rows["Piggyback"].mark, round(rows["Piggyback"].recomputed)) == (2838, "P", 2840)
    assert (rows["Finetune"].s, rows["Finetune"].recomputed) == (2500, 2500)
    assert (rows["Joint training, ResNet-26"].s, round(rows["Joint training, ResNet-26"].recomputed)) == (2866, 2867)
    # Rows whose score is not printed have none with a mark.
    assert {name for name, row in rows.items() if row.s is None} == {
        "URL, ResNet-26",
        "URL + parallel adapters, ResNet-26",
    }
    for row in rows.values():
        if row.s is not None:
            assert row.s == int(row.s)
            assert row.recomputed is None or row.recomputed == pytest.approx(row.s, rel=6e-3)


def _results(names: list[str], split: str = "test", whole: bool = True) -> dict:
    results = {
        "accuracy": {name: DECATHLON_BASELINE[name] for name in names},
        "mean_accuracy": 70.0,
        "beta": 0.5,
        "sharing": None,
        "split": split,
        "union": 0.5,
        "intersection": 0.5,
        "cost": {"flop": 0.5, "exact_flop": 0.5, "params": 2.0},
        "protocol": {"data": "decathlon", "evaluated_on": split, "whole": whole},
    }
    return results | scored(results, DECATHLON_BASELINE)


def test_partial_decathlon_is_not_compared_with_published_rows() -> None:
    names = list(DECATHLON_BASELINE)
    whole = _results(names)
    assert whole["scores"]["S"] == 2500
    assert shown_score(whole["scores"]) == (2500, "")
    assert any("| Piggyback | 2838 | [P] | 2840 |" in line for line in _published("decathlon", [("all", whole)]))
    for other, key, note in (
        (_results(names[:2]), "S_partial", "2 of 10 domains"),
        (_results(names, "val"), "S_val", "val"),
        (_results(names[:2], "val"), "S_partial_val", "2 of 10 domains, val"),
    ):
        assert "S" not in other["scores"]
        assert shown_score(other["scores"]) == (other["scores"][key], note)
        lines = _published("decathlon", [("all", whole), ("part", other)])
        assert not any("Piggyback" in line for line in lines)
        assert f"part is not ({note})" in lines[-1]
        assert f"{other['scores'][key]:.0f} ({note}) |" in results_table([("part", other)])
    extract = _published("decathlon", [("extract", _results(names, whole=False))])
    assert "an extract, or relative to another baseline" in extract[-1]
    # Results of earlier versions did not say of which images they were.
    assert shown_score({"S": 2500.0, "domains": {}}) == (2500.0, "split not recorded")
