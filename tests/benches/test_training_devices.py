"""The study of training by device and backend: opt-in backends, time stamps, and options that are rejected."""

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
from benches.training import bench, layers, report, steps
from benches.training.cells import LayerCell

TINY = Cell(next(case for case in CASES if case.shape == "7x7-512-512-k3s1"), 1, 0.25, "in", "nchw")


def test_wrong_opt_in_backend_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    layer_bench = layers.LayerBench(peaks=False)
    cell = LayerCell(TINY, "trained")
    by_variant = {row.variant: row for row in layer_bench.rows(cell, ("masked", "auto", "aten"), 0)}
    assert set(by_variant) == {"masked", "auto", "aten"}
    assert layer_bench.skipped == []
    assert {row.device for row in by_variant.values()} == {"cpu"}
    assert [row[3] for row in report.means_table(list(by_variant.values())).rows] == ["ours", "aten"]

    right = layers.LayerBench.check

    def wrong_aten(self: layers.LayerBench, name: str, variant: layers.Variant, cell: LayerCell) -> float:
        if name == "aten":
            raise gate.WrongResultError("aten is wrong")
        return right(self, name, variant, cell)

    monkeypatch.setattr(layers.LayerBench, "check", wrong_aten)
    assert {row.variant for row in layer_bench.rows(cell, ("masked", "auto", "aten"), 0)} == {"masked", "auto"}
    assert layer_bench.skipped == ["aten is wrong"]


def test_required_variant_that_cannot_run_raises() -> None:
    reasons: list[str] = []

    def check(name: str) -> float:
        if name != "masked":
            raise NotImplementedError(f"{name} cannot")
        return 1e-6

    assert bench.passing(("masked", "triton"), check, reasons, steps.VARIANTS) == {"masked": 1e-6}
    assert reasons == ["triton cannot"]
    with pytest.raises(NotImplementedError, match="auto cannot"):
        bench.passing(("masked", "auto"), check, reasons, steps.VARIANTS)


def test_marks_give_seconds_between_time_stamps(monkeypatch: pytest.MonkeyPatch) -> None:
    stamps = iter((5.0, 7.0, 7.5))
    monkeypatch.setattr(timers, "time", SimpleNamespace(perf_counter=lambda: next(stamps)))
    marks = timers.Marks(torch.device("cpu"))
    for _ in range(3):
        marks.mark()
    assert list(marks.seconds()) == [2.0, 0.5]


def test_unavailable_device_or_unsupported_kind_raises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = command.parser().parse_args(["--device", "cuda"])
    command.choose_kinds(options)
    assert [options.layers, options.steps, options.parts, options.curve] == [True, True, False, False]
    default = command.parser().parse_args([])
    explicit = command.parser().parse_args(["--device", "cpu"])
    assert vars(default) == vars(explicit)
    command.choose_kinds(default)
    assert [default.layers, default.steps, default.parts, default.curve] == [True] * 4
    assert command.main(["--device", "cuda", "--curve", "--out", str(tmp_path)]) == 1
    assert "expected `--device cuda` with --layers and --steps alone, got --curve" in _output(capsys)
    if not torch.cuda.is_available():
        assert command.main(["--device", "cuda", "--steps", "--out", str(tmp_path)]) == 1
        assert "to be available, got cuda, but PyTorch sees no GPU. Hint: leave out --device" in _output(capsys)
    assert not list(tmp_path.iterdir())


def _output(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())
