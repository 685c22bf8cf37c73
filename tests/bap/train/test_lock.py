"""One run in a folder at a time, and a killed one leaves no lock behind."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from bap.files import FileError
from bap.train.lock import LOCK, folder_lock

ROOT = Path(__file__).parents[3]
# A DataLoader's worker is such a child: it must not keep the lock of its killed parent.
HOLD = """
import os, sys, time
from bap.train.lock import folder_lock
with folder_lock(sys.argv[1]):
    child = os.fork()
    if child == 0:
        sys.stdin.read()
        os._exit(0)
    print(os.getpid(), flush=True)
    sys.stdin.read()
"""


def _holder(folder: Path) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'python'}"}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert int(process.stdout.readline()) == process.pid
    return process


def test_second_process_is_refused_and_a_killed_one_releases_the_lock(tmp_path: Path) -> None:
    process = _holder(tmp_path)
    try:
        with (
            pytest.raises(
                FileError, match=rf"expected no other run in .*, got process {process.pid} on .*\. Hint: wait"
            ),
            folder_lock(tmp_path),
        ):
            pass
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == process.pid
        os.kill(process.pid, signal.SIGKILL)
        process.wait(timeout=60)
        # Its child lives on, as its input is still open.
        with folder_lock(tmp_path):
            assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    finally:
        process.kill()
        assert process.stdin is not None
        process.stdin.close()
        process.wait(timeout=60)
    assert not (tmp_path / LOCK).exists()


def test_lock_is_reentrant_in_its_thread_only(tmp_path: Path) -> None:
    problems: list[str] = []

    def other() -> None:
        try:
            with folder_lock(tmp_path / "run"):
                problems.append("taken twice")
        except FileError as error:
            problems.append(str(error))

    with folder_lock(tmp_path / "run"):
        with folder_lock(tmp_path / "run" / ".." / "run"):
            pass
        assert (tmp_path / "run" / LOCK).exists()
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert "in another thread of this process" in problems[0]
    assert not (tmp_path / "run" / LOCK).exists()
    with pytest.raises(ZeroDivisionError), folder_lock(tmp_path / "run"):
        raise ZeroDivisionError
    with folder_lock(tmp_path / "run"), folder_lock(None):
        pass


def test_file_system_without_locks_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", without)
    with (
        pytest.warns(UserWarning, match=r"has no locks \(No locks available\)\. Make sure yourself"),
        folder_lock(tmp_path),
    ):
        pass


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(FileError, match=r"expected a folder .*file/run to write to"),
        folder_lock(tmp_path / "file" / "run"),
    ):
        pass
