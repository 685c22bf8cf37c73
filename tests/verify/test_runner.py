"""Verdicts on families that misbehave, and that the process which asks is unharmed."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from bap_kernels.verify import Verdict, runner
from tests.verify.conftest import ROOT, subject
from tests.verify.processes import is_running, wait_for_end


def judged(*behaviours: str, timeout: float = 600.0, **options: str) -> dict[str, Verdict]:
    """Verdicts by behaviour."""
    found: dict[str, Verdict] = {}
    device = subject(*behaviours, **options)
    runner.run(device.families, device, found.__setitem__, timeout=timeout)
    return {family.split("/")[1]: verdict for family, verdict in found.items()}


BEHAVIOURS = {
    "right": ("ok", "2 cases"),
    "wrong": ("wrong", "wrong: Tensor-likes are not close"),
    "unwritten": ("wrong", "unwritten: Tensor-likes are not close"),
    "outside": ("wrong", "outside: memory around a tensor (2, 3, 4) was written to"),
    "into_input": ("wrong", "into_input: an argument or the memory around it was written to"),
    "reads_outside": ("wrong", "reads_outside: Tensor-likes are not close"),
    "varying": ("wrong", "varying: run 3 differs from the first result"),
    "crash": ("crash", "crash: first run: killed by SIGSEGV"),
    "abort": ("crash", "abort: first run: killed by SIGABRT: an assertion of the driver failed"),
    "exits": ("crash", "exits: first run: ended with status 3"),
    "killed": ("unknown", "killed: first run: killed by SIGKILL, from outside or for want of memory"),
    "no_memory": ("unknown", "no_memory: OutOfMemoryError: CUDA out of memory."),
    "no_host_memory": ("unknown", "no_host_memory: MemoryError"),
    "raising": ("crash", "raising: RuntimeError: out of resource: shared memory"),
    "declining": ("unknown", "declining: not run: NotImplementedError: gathered_conv2d(): expected a call"),
    "caseless": ("crash", "right: RuntimeError: the cases cannot be made"),
}


# One test, as all families are judged in one run; a process of pytest-xdist that got a part of many would judge all.
def test_verdicts() -> None:
    verdicts = judged(*BEHAVIOURS)
    assert verdicts.keys() == BEHAVIOURS.keys()
    for behaviour, (verdict, reason) in BEHAVIOURS.items():
        found = verdicts[behaviour]
        assert found.verdict == verdict, behaviour
        assert found.reason.startswith(reason)
        assert "\n" not in found.reason


def test_hanging_family_is_killed_with_what_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grandchild = tmp_path / "grandchild"
    is_late = runner._Child.is_late
    # However slow the machine is, it is the call that hangs which is met, not what comes before.
    monkeypatch.setattr(runner._Child, "is_late", lambda child: grandchild.exists() and is_late(child))
    found = judged("hang", timeout=1.0)["hang"]
    assert (found.verdict, found.reason) == ("hang", "hang: first run: no end after 1 s")
    wait_for_end(int(grandchild.read_text()))


def test_process_that_is_never_ready_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "START_TIMEOUT_S", 1.0)
    # Started, and silent.
    found = judged("right", timeout=0.1, device="Sleeping")["right"]
    assert (found.verdict, found.reason) == ("unknown", "the process was not ready after 1 s")


@pytest.mark.parametrize(
    ("device", "verdict", "reason"),
    [
        ("Poisoned", "crash", "RuntimeError: CUDA error: an illegal memory access was encountered"),
        ("Busy", "unknown", "the device cannot be used: RuntimeError: CUDA error: all CUDA-capable devices are busy"),
        ("Graphs", "wrong", "the replayed graph differs from the first result"),
        ("Missing", "unknown", "the device cannot be used: AttributeError"),
    ],
)
def test_devices_that_fail(device: str, verdict: str, reason: str) -> None:
    found = judged("sticky", device=device)["sticky"]
    assert found.verdict == verdict
    assert reason in found.reason


def test_family_without_cases_is_unknown() -> None:
    found = judged("right", checks="no_checks")["right"]
    assert (found.verdict, found.reason) == ("unknown", "none of the calls that are tried runs it here")


def test_interpreter_that_does_not_start_is_unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no such thing >&2\nexit 7\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    found = judged("right")["right"]
    assert (found.verdict, found.reason) == (
        "unknown",
        "the process did not start: ended with status 7: no such thing",
    )
    monkeypatch.setattr(sys, "executable", str(tmp_path / "missing"))
    found = judged("right")["right"]
    assert found.verdict == "unknown"
    assert found.reason.startswith("no process could be started: [Errno 2]")


def test_stopping_ends_the_children() -> None:
    stop, found, started = threading.Event(), {}, []

    def on_step(family: str, what: str) -> None:
        if "first run" in what and family == "x/hang/float32":
            started.append(next(iter(runner._running)).process.pid)
            stop.set()

    runner.run(["x/hang/float32"], subject("hang"), found.__setitem__, on_step, stop=stop)
    assert found == {}
    wait_for_end(started[0])


def test_children_run_side_by_side_and_no_more_than_asked_for() -> None:
    most, running = 0, set()

    def on_step(family: str, what: str) -> None:
        nonlocal most
        running.add(family)
        most = max(most, len(running))

    def on_verdict(family: str, verdict: Verdict) -> None:
        running.discard(family)

    many = subject(*(f"right{number}" for number in range(3)))
    runner.run(many.families, many, on_verdict, on_step, jobs=2)
    assert most == 2


def test_children_see_neither_the_users_folder_nor_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "random.py").write_text("raise SystemExit('not the one of the library')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BAP_KERNELS_BACKEND", "cuda")
    monkeypatch.setenv("BAP_KERNELS_VERIFY", "block")
    environment = runner._environment(subject("right"))
    assert "BAP_KERNELS_BACKEND" not in environment
    assert environment["BAP_KERNELS_VERIFY"] == "0"
    if sys.version_info >= (3, 11):
        assert judged("right")["right"].verdict == "ok"


PARENT = """
import os, sys, threading
from bap_kernels.verify import runner
from tests.verify.conftest import subject

def on_step(family, what):
    if "first run" in what and "hang:" in what:
        print(next(iter(runner._running)).process.pid, flush=True)

runner.run(["x/hang/float32"], subject("hang"), lambda *found: None, on_step)
"""


@pytest.mark.parametrize("signal", ["KILL", "TERM"])
def test_no_child_outlives_its_parent(signal: str) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/python"}
    parent = subprocess.Popen([sys.executable, "-c", PARENT], env=environment, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert is_running(child)
    parent.kill() if signal == "KILL" else parent.terminate()
    parent.wait()
    wait_for_end(child)
