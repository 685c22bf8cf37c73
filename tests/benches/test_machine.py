"""What a study says of its machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from benches import machine


@pytest.mark.parametrize("ticks", [(0, 0), (150, 50)])
def test_busy_cores_are_what_the_ticks_say(
    ticks: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stat, times = tmp_path / "stat", iter((10.0, 12.0))

    def write(user: int, system: int) -> None:
        stat.write_text(f"cpu  {100 + user} 20 {30 + system} 5000 70 1 2 3 40 50\ncpu0 1 2 3 4 5 6 7 8 9 10\n")

    write(0, 0)
    monkeypatch.setattr(machine.time, "sleep", lambda seconds: write(*ticks))
    monkeypatch.setattr(machine.time, "monotonic", lambda: next(times))
    monkeypatch.setattr(machine.os, "sysconf", lambda name: 100)
    assert machine.busy_cores(2.0, stat) == sum(ticks) / 100 / 2


@pytest.mark.parametrize("text", [None, "", "cpu  much\n"])
def test_systems_that_do_not_say(text: str | None, tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    if text is not None:
        stat.write_text(text)
    assert machine.busy_cores(0.0, stat) is None
