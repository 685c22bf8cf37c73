"""Callbacks are told of the start, of every epoch and of the end, and only real ones are taken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from bap.config import Config
from bap.data import Domain
from bap.results.callbacks import Callback, flat_numbers, load_callback
from bap.results.run import train_run
from bap.train.run_log import read_metrics


class _Recorder(Callback):
    def __init__(self) -> None:
        self.told: list[Any] = []

    def started(self, config: Config, folder: Path | None) -> None:
        self.told.append(("started", config.schedule.epochs, folder))

    def epoch_ended(self, record: Any) -> None:
        self.told.append(("epoch", dict(record)))

    def ended(self, results: Any) -> None:
        self.told.append(("ended", results["mean_accuracy"]))


def test_a_run_tells_its_callbacks(tiny: Config, suite: dict[str, Domain], tmp_path: Path) -> None:
    recorder = _Recorder()
    config = tiny.replace(epochs=2)
    results = train_run(config, tmp_path / "run", domains=suite, baseline={}, callbacks=[recorder])
    assert recorder.told[0] == ("started", 2, tmp_path / "run")
    assert [told[1] for told in recorder.told[1:3]] == read_metrics(tmp_path / "run")
    assert recorder.told[3:] == [("ended", results["mean_accuracy"])]
    numbers = flat_numbers(json.loads((tmp_path / "run" / "results.json").read_text()))
    assert numbers["cost/domains/digits/macs"] == results["cost"]["domains"]["digits"]["macs"]
    assert all(type(value) in (int, float) for value in numbers.values())
    # The base class does nothing.
    train_run(config.replace(epochs=1), None, domains=suite, baseline={}, callbacks=[Callback()])


def test_a_callback_that_fails_leaves_the_last_epoch(tiny: Config, suite: dict[str, Domain], tmp_path: Path) -> None:
    class Failing(Callback):
        def epoch_ended(self, record: Any) -> None:
            raise ConnectionError("no network")

    with pytest.raises(ConnectionError):
        train_run(tiny.replace(epochs=2), tmp_path / "run", domains=suite, baseline={}, callbacks=[Failing()])
    assert [record["epoch"] for record in read_metrics(tmp_path / "run")] == [1]
    train_run(tiny.replace(epochs=2), tmp_path / "run", resume=True, domains=suite, baseline={})
    assert [record["epoch"] for record in read_metrics(tmp_path / "run")] == [1, 2]


def test_callbacks_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "of_the_user.py").write_text(
        "from bap.results.callbacks import Callback\n\nclass Mine(Callback):\n    pass\n\nother = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    assert type(load_callback("of_the_user:Mine")).__name__ == "Mine"
    for name, message in (
        ("of_the_user", "to be package.module:Class, got 'of_the_user'"),
        ("of_the_user:Yours", "expected 'of_the_user:Yours' to be there, got module"),
        ("nowhere_to_be_found:Mine", "expected 'nowhere_to_be_found:Mine' to be there, got No module"),
        ("of_the_user:other", "expected 'of_the_user:other' to be a bap.results.callbacks.Callback, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            load_callback(name)
