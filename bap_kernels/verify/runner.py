"""Runs the children of a verifier side by side, each in a process group of its own, and says what became of them."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bap_kernels.verify.subject import Subject
from bap_kernels.verify.verdict import Verdict

__all__ = ["START_TIMEOUT_S", "TIMEOUT_S", "default_jobs", "kill_all", "run"]

TIMEOUT_S = 120.0
START_TIMEOUT_S = 300.0
_KEPT_BYTES = 4000
_TICK_S = 0.1
# Signals that somebody else sends: the kernel where memory is short, an administrator, a shell.
_FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGXCPU)
_ROOT = str(Path(__file__).resolve().parents[2])

_running: set[_Child] = set()
_guard = threading.Lock()
_closed = False


def _environment(subject: Subject) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name != "BAP_KERNELS_BACKEND"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [_ROOT, os.environ.get("PYTHONPATH", "")]))
    return environment | {
        "PYTHONSAFEPATH": "1",  # no modules from wherever the user happens to be
        "BAP_KERNELS_VERIFY": "0",
        "BAP_KERNELS_AUTOTUNE": "0",
        "BAP_KERNELS_CACHE_DIR": "",  # tiles are those of the table, not what was tuned here
        "OMP_NUM_THREADS": "1",
        **subject.environment,
    }


class _Child:
    """A process that judges one family."""

    def __init__(self, family: str, subject: Subject, timeout: float, background: bool) -> None:
        self.family, self.timeout = family, timeout
        self.started = self.heard = time.monotonic()
        self.ready, self.step, self.output = False, "", b""
        self.verdict: Verdict | None = None
        self._text = b""
        self.pipe, theirs = os.pipe()
        try:
            os.set_blocking(self.pipe, False)
            request = {"family": family, "device": subject.device, "checks": subject.checks}
            request |= {"pipe": theirs, "parent": os.getpid(), "nice": 10 if background else 0}  # type: ignore[dict-item]
            self.process = subprocess.Popen(
                [sys.executable, "-m", "bap_kernels.verify.child", json.dumps(request)],
                env=_environment(subject),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(theirs,),
                start_new_session=True,
            )
        except BaseException:
            os.close(self.pipe)
            raise
        finally:
            os.close(theirs)
        assert self.process.stdout is not None
        self.printed = self.process.stdout.fileno()
        os.set_blocking(self.printed, False)

    def read(self) -> None:
        """Takes in what the child has written so far."""
        self.output = (self.output + self._drain(self.printed))[-_KEPT_BYTES:]
        lines = (self._text + self._drain(self.pipe)).split(b"\n")
        self._text = lines.pop()
        for line in lines:
            message = json.loads(line)
            self.heard = time.monotonic()
            self.ready = self.ready or "ready" in message
            self.step = message.get("step", self.step)
            if "verdict" in message:
                self.verdict = Verdict(message["verdict"], message["reason"])

    @staticmethod
    def _drain(handle: int) -> bytes:
        parts = []
        with contextlib.suppress(BlockingIOError):
            while part := os.read(handle, 65536):
                parts.append(part)
        return b"".join(parts)

    def has_ended(self) -> bool:
        """Whether its process has ended; it is not reaped yet, so its number is still its own."""
        try:
            return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:
            return True  # reaped by somebody else, as where SIGCHLD is ignored

    def is_late(self) -> bool:
        """Whether it has been silent for too long."""
        return time.monotonic() - self.heard > (self.timeout if self.ready else max(self.timeout, START_TIMEOUT_S))

    def kill(self) -> None:
        """Ends the process and whatever it has started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self.process.returncode is None:
                os.killpg(self.process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Reaps the process, which ends at once unless its driver keeps it."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        os.close(self.pipe)
        if self.process.stdout is not None:
            self.process.stdout.close()

    def late_verdict(self) -> Verdict:
        """Of one that was silent for too long."""
        if not self.ready:
            return self._verdict("unknown", f"the process was not ready after {START_TIMEOUT_S:.0f} s")
        return self._verdict("hang", f"{self.step or 'making the cases'}: no end after {self.timeout:.0f} s")

    def ended_verdict(self) -> Verdict:
        """Of one whose process has ended and is reaped."""
        if self.verdict is not None:
            return self._verdict(self.verdict.verdict, self.verdict.reason)
        code = self.process.returncode
        printed = [line for line in self.output.decode(errors="replace").splitlines() if line.strip()]
        last = f": {printed[-1].strip()[:200]}" if printed else ""
        if code is not None and code < 0:
            sent = signal.Signals(-code) if -code in signal.Signals.__members__.values() else None
            how = f"killed by {sent.name if sent else f'signal {-code}'}"
        else:
            sent, how = None, f"ended with status {code}"
        if not self.ready:
            return self._verdict("unknown", f"the process did not start: {how}{last}")
        where = self.step or "making the cases"
        if sent in _FROM_OUTSIDE:
            return self._verdict("unknown", f"{where}: {how}, from outside or for want of memory")
        return self._verdict("crash", f"{where}: {how}{last}")

    def _verdict(self, verdict: str, reason: str) -> Verdict:
        return Verdict(verdict, reason, round(time.monotonic() - self.started, 1))


def default_jobs(subject: Subject, background: bool) -> int:
    """Children at once: by cores, of which work in the background takes a quarter, and by the device's memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(subject.jobs, cores // 4 if background else max(2, cores - 1)))


def kill_all() -> None:
    """Ends every child, and starts no other: this process is about to end."""
    global _closed
    with _guard:
        _closed = True
        for child in _running:
            child.kill()


def run(
    families: Sequence[str],
    subject: Subject,
    on_verdict: Callable[[str, Verdict], None],
    on_step: Callable[[str, str], None] | None = None,
    timeout: float = TIMEOUT_S,
    jobs: int | None = None,
    background: bool = False,
    stop: threading.Event | None = None,
) -> None:
    """Has families judged; returns when all are, or early where ``stop`` is set.

    Args:
        on_verdict: called with each family and its verdict, in the calling thread.
        on_step: called with a family and what its child does now.
        timeout: seconds without a word after which a child hangs; each call of a kernel is one.
        jobs: children at once.
        background: whether somebody else needs the machine.
    """
    jobs = jobs or default_jobs(subject, background)
    waiting, running = list(families), {}
    selector = selectors.DefaultSelector()

    def start(family: str) -> None:
        with _guard:
            if _closed:
                return
            child = _Child(family, subject, timeout, background)
            _running.add(child)
        for handle in (child.pipe, child.printed):
            selector.register(handle, selectors.EVENT_READ, family)
            running[family] = child
        if on_step:
            on_step(family, "starting")

    def finish(child: _Child) -> None:
        for handle in (child.pipe, child.printed):
            with contextlib.suppress(KeyError):
                selector.unregister(handle)
        child.kill()
        child.close()
        with _guard:
            _running.discard(child)
        running.pop(child.family, None)

    try:
        while (waiting or running) and not (stop and stop.is_set()) and not _closed:
            while waiting and len(running) < jobs:
                family = waiting.pop(0)
                try:
                    start(family)
                except OSError as error:
                    on_verdict(family, Verdict("unknown", f"no process could be started: {error}"))
            for key, _ in selector.select(_TICK_S):
                child = running.get(key.data)
                if child is None:
                    continue
                before = child.step
                child.read()
                if on_step and child.step != before:
                    on_step(child.family, child.step)
            for child in list(running.values()):
                if child.has_ended():
                    child.read()
                    finish(child)
                    on_verdict(child.family, child.ended_verdict())
                elif child.is_late():
                    finish(child)
                    on_verdict(child.family, child.late_verdict())
    finally:
        for child in list(running.values()):
            finish(child)
        selector.close()
