"""The tool that runs every operation on known networks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tools import try_networks
from tools.networks import build, calibrate_, names, relative_error


def test_list_has_103_networks_with_shapes() -> None:
    shapes = names()
    assert len(shapes) == 103
    assert all(len(shape) == 4 for shape in shapes.values())
    assert shapes["tv/retinanet_head"] == (2, 32, 16, 16)


@pytest.fixture(scope="module")
def subject() -> try_networks.Subject:
    return try_networks.Subject("own/unet_interp", (2, 3, 16, 16))


@pytest.mark.parametrize("operation", [name for name in try_networks.OPERATIONS if name != "swap"])
def test_operation_is_right_on_unet(subject: try_networks.Subject, operation: str) -> None:
    outcome = try_networks._outcome(operation, subject)
    assert outcome["status"] == "ok", outcome
    if operation == "plan":
        assert (outcome["lowered"], outcome["convolutions"], outcome["reasons"]) == (8, 8, {})


def test_outcome_is_wrong_refused_or_crash(subject: try_networks.Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(subject: try_networks.Subject) -> dict[str, Any]:
        subject.compare(subject.expected("a") * 1.01, subject.expected("a"), "result")
        return {}

    def refused(subject: try_networks.Subject) -> dict[str, Any]:
        raise ValueError("plan(): expected `x` to be y, got z.")

    def crash(subject: try_networks.Subject) -> dict[str, Any]:
        raise ValueError("too many values to unpack")

    for operation in (wrong, refused, crash):
        monkeypatch.setitem(try_networks.OPERATIONS, "plan", operation)
        expected = {"wrong": "WRONG"}.get(operation.__name__, operation.__name__)
        assert try_networks._outcome("plan", subject)["status"] == expected


def test_relative_error_is_per_tensor() -> None:
    big, small = torch.full((3,), 100.0), torch.ones(2)
    assert relative_error({"a": big, "b": [small]}, {"a": big, "b": [small]}) == 0
    assert relative_error((big, small * 1.5), (big, small)) == pytest.approx(0.5)
    assert relative_error((big,), (big, small)) == float("inf")
    assert relative_error(torch.full((3,), float("nan")), big) == float("inf")
    assert relative_error(small, big) == float("inf")


def test_calibrated_network_has_no_vanishing_channel() -> None:
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    model = calibrate_(build("own/unet_transpose"), x)
    with torch.no_grad():
        assert (model(x).std(dim=(0, 2, 3)) > 1e-2).all()


def test_table_counts_outcomes_and_lists_reasons(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [
        {"network": "a", "operation": "plan", "status": "hang"},
        {"network": "a", "operation": "plan", "status": "ok", "convolutions": 3, "lowered": 2, "reasons": {"c": "why"}},
        {"network": "b", "operation": "plan", "status": "ok", "convolutions": 4, "lowered": 4, "reasons": {}},
        {"network": "b", "operation": "prune", "status": "refused", "detail": "ValueError: prune_unused_(): no"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = try_networks.table(try_networks.read(path), ["a", "b"])
    assert "| a | 3 | 2 |  | ok |" in text
    assert "2 networks; in 1 the plan lowers every convolution." in text
    assert "- plan: 2 ok" in text
    assert "- b, prune: refused: ValueError: prune_unused_(): no" in text
    assert "- a: 1 not lowered, such as ('c', 'why')" in text
