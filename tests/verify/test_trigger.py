"""Verification at first use: in the background, waited for, or not at all; by processes at once; after a kill."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from bap_kernels import _C, settings
from bap_kernels.verify import Verdict, runner, trigger, verify_subject
from bap_kernels.verify.store import Store
from bap_kernels.verify.subject import Subject
from tests.verify.conftest import INDEX, ROOT, subject
from tests.verify.processes import wait_for_end


def verdicts() -> dict[str, str]:
    """What `auto` has been given, by behaviour."""
    return {family.split("/")[1]: verdict for family, (verdict, _) in _C.verdicts(INDEX).items()}


def with_mode(mode: str, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    changed = dataclasses.replace(settings.settings, cache_dir=cache, verify=mode)
    monkeypatch.setattr(trigger, "settings", changed)


def first_use(device: Subject) -> None:
    trigger.first_use(INDEX, lambda index: device)


@pytest.fixture
def no_children(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Instead of running children, notes what they would be run for."""
    asked: list[list[str]] = []
    monkeypatch.setattr(runner, "run", lambda families, *rest: asked.append(list(families)))
    return asked


def test_block_returns_with_the_verdicts(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    with_mode("block", monkeypatch, cache)
    first_use(subject("right", "wrong", "crash"))
    assert verdicts() == {"right": "ok", "wrong": "wrong", "crash": "crash"}
    assert _C.verdicts(INDEX)["x/crash/float32"][1].startswith("crash: first run: killed by SIGSEGV")


def test_background_returns_at_once_and_publishes_later() -> None:
    device = subject("right", "no_memory")
    first_use(device)
    thread = trigger._threads[INDEX]
    assert thread.daemon
    thread.join()
    assert verdicts() == {"right": "ok", "no_memory": "unknown"}


def test_zero_starts_nothing_but_takes_what_is_stored(
    monkeypatch: pytest.MonkeyPatch, cache: Path, store: Store, no_children: list[list[str]]
) -> None:
    device = subject("right", "wrong")
    with_mode("0", monkeypatch, cache)
    trigger._threads.clear()
    first_use(device)
    assert verdicts() == {}
    store.save(device.facts, {"x/right/float32": Verdict("ok")})
    first_use(device)
    assert verdicts() == {"right": "ok"}
    assert no_children == []
    assert trigger._threads == {}


def test_what_is_known_is_not_verified_again(
    monkeypatch: pytest.MonkeyPatch, cache: Path, store: Store, no_children: list[list[str]]
) -> None:
    with_mode("block", monkeypatch, cache)
    device, now = subject("right", "wrong", "crash", "hang", "exits"), time.time()
    known = {"wrong": "wrong", "crash": "crash", "hang": "unknown", "exits": "unknown"}
    store.save(device.facts, {f"x/{name}/float32": Verdict(each) for name, each in known.items()})
    store.save(device.facts, {"x/exits/float32": Verdict("unknown", time=now - 1201)})
    monkeypatch.setattr(
        runner,
        "run",
        lambda families, subject, keep, *rest: [
            no_children.append(list(families)),
            [keep(family, Verdict("unknown")) for family in families],
        ],
    )
    first_use(device)
    # Unknown for two tries and more than 1200 s; what is unknown again is not tried in a loop.
    assert no_children == [["x/right/float32", "x/exits/float32"]]
    first_use(device)
    assert len(no_children) == 1


@pytest.mark.parametrize("fact", ["driver", "extension"])
def test_another_driver_or_build_is_verified_anew(
    fact: str, monkeypatch: pytest.MonkeyPatch, cache: Path, store: Store, no_children: list[list[str]]
) -> None:
    with_mode("block", monkeypatch, cache)
    old, new = (subject("right", **{fact: each}) for each in ("old", "new"))
    store.save(old.facts, {"x/right/float32": Verdict("ok")})
    stop = threading.Event()
    monkeypatch.setattr(runner, "run", lambda families, *rest: [no_children.append(list(families)), stop.set()])
    trigger.verify_missing(old, store, stop=stop)
    assert (no_children, verdicts()) == ([], {"right": "ok"})
    trigger.verify_missing(new, store, stop=stop)
    assert (no_children, verdicts()) == ([["x/right/float32"]], {})


def test_no_worker_and_no_child_verifies(monkeypatch: pytest.MonkeyPatch, no_children: list[list[str]]) -> None:
    assert trigger._may_start()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, b"1" if trigger._may_start() else b"0")
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 1) == b"0"
    os.close(reader)
    os.close(writer)
    monkeypatch.setattr(multiprocessing.current_process(), "_config", {"daemon": True})
    assert not trigger._may_start()


def test_errors_become_a_warning() -> None:
    def failing(index: int) -> Subject:
        raise OSError("no driver")

    with pytest.warns(UserWarning, match=rf"kernels for cuda:{INDEX} are not verified, .*: no driver"):
        trigger.first_use(INDEX, failing)


def test_simulated_devices_of_other_tests_start_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trigger, "cuda_problem", lambda: "there is no CUDA device")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trigger.first_use(INDEX)
    assert verdicts() == {}


PROCESS = """
import sys, threading
from pathlib import Path
from bap_kernels.verify import trigger
from bap_kernels.verify.store import Store
from tests.verify.conftest import subject

device = subject("right", "wrong", "counted")
trigger.verify_missing(device, Store(Path(sys.argv[1])))
known = Store(Path(sys.argv[1])).load(device.facts)
print(sorted(f"{family.split('/')[1]}={verdict.verdict}" for family, verdict in known.items()))
"""


def test_eight_processes_verify_once(cache: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/python"}
    command = [sys.executable, "-c", PROCESS, str(cache)]
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(8)]
    printed = {process.communicate()[0].strip() for process in processes}
    assert printed == {"['counted=ok', 'right=ok', 'wrong=wrong']"}
    assert [process.returncode for process in processes] == [0] * 8
    # One child noted itself.
    assert len((tmp_path / "counted").read_text().split()) == 1


def test_killed_verifier_leaves_what_was_done(cache: Path, store: Store, tmp_path: Path) -> None:
    script = PROCESS.replace('"right", "wrong", "counted"', '"right", "hang"')
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/python"}
    process = subprocess.Popen([sys.executable, "-c", script, str(cache)], env=environment)
    device = subject("right", "hang")
    while "x/right/float32" not in store.load(device.facts) or not (tmp_path / "grandchild").exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert store.load(device.facts).keys() == {"x/right/float32"}
    # The next one takes the lock over and goes on.
    asked = []
    stop = threading.Event()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "run", lambda families, *rest: [asked.append(list(families)), stop.set()])
        trigger.verify_missing(device, store, stop=stop)
    assert asked == [["x/hang/float32"]]
    os.kill(int((tmp_path / "grandchild").read_text()), signal.SIGKILL)


EXITS = """
from bap_kernels.verify import runner, trigger
from tests.verify.conftest import subject
import os, time
trigger.first_use(77, lambda index: subject("hang"))
while not os.path.exists(os.environ["TEST_VERIFY_FOLDER"] + "/grandchild"):
    time.sleep(0.05)
print(next(iter(runner._running)).process.pid, flush=True)
"""


def test_background_does_not_keep_the_interpreter(cache: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/python"}
    environment |= {"BAP_KERNELS_CACHE_DIR": str(cache), "BAP_KERNELS_VERIFY": "1"}
    process = subprocess.run([sys.executable, "-c", EXITS], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    wait_for_end(int(process.stdout))
    # The whole process group: what the child had started, too.
    wait_for_end(int((tmp_path / "grandchild").read_text()))


def test_verify_forces_and_retries(store: Store, as_later_process: Callable[[], None]) -> None:
    device = subject("right", "wrong")
    store.save(device.facts, {"x/right/float32": Verdict("unknown"), "x/wrong/float32": Verdict("ok")})
    report = verify_subject(device)
    # Unknown was tried at once; what has a verdict is left.
    assert {name: each.verdict for name, each in report.items()} == {"x/right/float32": "ok", "x/wrong/float32": "ok"}
    as_later_process()
    report = verify_subject(device, ["*/wrong/*"], force=True)
    assert [each.verdict for each in report.values()] == ["wrong"]
    assert not report.ok
    assert verdicts() == {"right": "ok", "wrong": "wrong"}
    assert report.file is not None
    stored = json.loads(report.file.read_text())["devices"][0]["families"]
    assert {name: each["verdict"] for name, each in stored.items()} == {
        "x/right/float32": "ok",
        "x/wrong/float32": "wrong",
    }
    assert "x/wrong/float32  wrong" in str(report)
    assert report.as_dict()["families"]["x/wrong/float32"]["reason"].startswith("wrong: Tensor-likes are not close")


def test_unknown_family_raises() -> None:
    with pytest.raises(
        ValueError, match=r"verify\(\): expected `families` to name families .*, got 'x/y/z'. Hint: it has x/r"
    ):
        verify_subject(subject("right"), ["x/y/z"])
