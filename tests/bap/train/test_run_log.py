"""The log of a run: curves that TensorBoard reads, progress lines, and a full disk."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path
from typing import Any

import pytest
from bap.files import FileError
from bap.train.run_log import RunLog, _Whole, read_metrics


def _record(epoch: int) -> dict[str, Any]:
    one = {"loss": 0.5 / epoch, "evaluated": 50.0 + epoch, "kept": 0.5, "multiplier": 0.0}
    return {"epoch": epoch, "seconds": 1.0, "union": 0.7, "intersection": 0.3, "domains": {"digits": one}}


def test_tensorboard_reads_the_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    # The tenth file of a second must sort after the ninth.
    monkeypatch.setattr("bap.train.run_log._Curves._numbers", itertools.count(9))
    log = RunLog(tmp_path, 3, progress=False)
    for epoch in (1, 2, 3):
        log.add(_record(epoch))
    # A run that goes on after its second epoch hides what it trains again.
    again = RunLog(tmp_path, 3, keep=2, progress=False)
    again.add({**_record(3), "union": 0.6})
    read = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    found = [(one.step, round(one.value, 4)) for one in read.Scalars("run/union")]
    assert found == [(1, 0.7), (2, 0.7), (3, 0.6)]
    assert [one.value for one in read.Scalars("evaluated/digits")] == [51, 52, 53]
    assert [one["epoch"] for one in read_metrics(tmp_path)] == [1, 2, 3]


def test_a_full_disk_under_the_curves_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = RunLog(tmp_path, 3, progress=False)
    log.add(_record(1))
    (events,) = (tmp_path / "tensorboard").iterdir()
    before = events.read_bytes()
    threads = threading.active_count()

    def full(self: _Whole, data: bytes) -> None:
        self.file.write(data[:7])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(_Whole, "write", full)
        with pytest.raises(FileError) as caught:
            log.add(_record(2))
    assert str(events) in str(caught.value)
    assert "got No space left on device. Hint: is the disk full?" in str(caught.value)
    # No half record, no thread that waits, and the run goes on from its state.
    assert events.read_bytes() == before
    assert threading.active_count() == threads
    again = RunLog(tmp_path, 3, keep=1, progress=False)
    again.add(_record(2))
    assert [one["epoch"] for one in read_metrics(tmp_path)] == [1, 2]


def test_steps_are_printed_by_their_number_or_time(capsys: pytest.CaptureFixture) -> None:
    log = RunLog(None, 2, progress=True, every=3)
    for step in range(1, 8):
        log.step(1, step, 7, "digits", lambda: 0.25)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"epoch 1/2  step {step}/7  digits  mean loss 0.250" for step in (3, 6)]
    # The loss is not asked for where no line is printed: it waits for the device.
    RunLog(None, 2, progress=True, every=0).step(1, 1, 7, "digits", lambda: pytest.fail("asked"))
    RunLog(None, 2, progress=False, every=1).step(1, 1, 7, "digits", lambda: pytest.fail("asked"))
    assert capsys.readouterr().err == ""
    # A step takes 12 seconds: every third one is 30 seconds after the last line, an epoch's among them.
    now = itertools.count(0, 12)
    log = RunLog(None, 2, progress=True, every=0, seconds=30.0, clock=lambda: float(next(now)))
    for step in range(1, 5):
        log.step(1, step, 4, "digits", lambda: 0.25)
    log.add(_record(1))
    for step in range(1, 4):
        log.step(2, step, 4, "digits", lambda: 0.25)
    lines = [line.split("  ")[:2] for line in capsys.readouterr().err.splitlines()]
    assert lines == [["epoch 1/2", "step 3/4"], ["epoch 1/2", "accuracy 51.00 %"], ["epoch 2/2", "step 3/4"]]
