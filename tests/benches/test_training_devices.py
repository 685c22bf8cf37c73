"""The study of training by device and backend: variants that are named, moments, and what the command line refuses."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

from benches import gate, timers
from benches.cases import CASES, Cell
from benches.training import __main__ as command
from benches.training import backends, layers, report, steps
from benches.training.cells import LayerCell

TINY = Cell(next(case for case in CASES if case.shape == "7x7-512-512-k3s1"), 1, 0.25, "in", "nchw")


def test_named_backends_are_variants_too(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = layers.LayerBench(peaks=False)
    cell = LayerCell(TINY, "trained")
    made = {row.variant: row for row in bench.rows(cell, ("masked", "auto", "aten"), 0)}
    assert set(made) == {"masked", "auto", "aten"}
    assert bench.left_out == []
    assert {row.device for row in made.values()} == {"cpu"}
    assert [row[3] for row in report.means_table(list(made.values())).rows] == ["ours", "aten"]

    right = layers.LayerBench.gated

    def wrong_aten(self: layers.LayerBench, name: str, variant: layers.Variant, cell: LayerCell) -> float:
        if name == "aten":
            raise gate.WrongResultError("aten is wrong")
        return right(self, name, variant, cell)

    monkeypatch.setattr(layers.LayerBench, "gated", wrong_aten)
    assert {row.variant for row in bench.rows(cell, ("masked", "auto", "aten"), 0)} == {"masked", "auto"}
    assert bench.left_out == ["aten is wrong"]


def test_a_wrong_backend_is_left_out_of_steps_and_ours_is_an_error() -> None:
    reasons: list[str] = []

    def check(name: str) -> float:
        if name != "masked":
            raise NotImplementedError(f"{name} cannot")
        return 1e-6

    assert backends.gated(("masked", "triton"), check, reasons, steps.BASELINES) == {"masked": 1e-6}
    assert reasons == ["triton cannot"]
    with pytest.raises(NotImplementedError, match="auto cannot"):
        backends.gated(("masked", "auto"), check, reasons, steps.BASELINES)


def test_marks_are_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter((5.0, 7.0, 7.5))
    monkeypatch.setattr(timers, "time", SimpleNamespace(perf_counter=lambda: next(moments)))
    marks = timers.Marks(torch.device("cpu"))
    for _ in range(3):
        marks.mark()
    assert list(marks.seconds()) == [2.0, 0.5]


def test_device_must_be_there_and_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = command.parser().parse_args(["--device", "cuda"])
    command.choose_kinds(options)
    assert [options.layers, options.steps, options.parts, options.curve] == [True, True, False, False]
    default = command.parser().parse_args([])
    named = command.parser().parse_args(["--device", "cpu"])
    assert vars(default) == vars(named)
    command.choose_kinds(default)
    assert [default.layers, default.steps, default.parts, default.curve] == [True] * 4
    assert command.main(["--device", "cuda", "--curve", "--out", str(tmp_path)]) == 1
    assert "expected `--device cuda` with --layers and --steps alone, got --curve" in _line(capsys)
    if not torch.cuda.is_available():
        assert command.main(["--device", "cuda", "--steps", "--out", str(tmp_path)]) == 1
        assert "to be one of this machine, got cuda, and PyTorch sees no GPU. Hint: leave --device out" in _line(capsys)
    assert not list(tmp_path.iterdir())


def _line(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())
