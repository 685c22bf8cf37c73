"""Verification at first use: started in the background by the first call of ``auto`` on a device, or waited for."""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from bap_kernels._load import _C
from bap_kernels._warn import warn
from bap_kernels.settings import settings
from bap_kernels.verify import runner
from bap_kernels.verify.show import Progress
from bap_kernels.verify.store import Store
from bap_kernels.verify.subject import Subject, cuda_problem, cuda_subject
from bap_kernels.verify.verdict import Verdict

__all__ = ["first_use", "missing", "publish", "verify_missing"]

_POLL_S = 0.5
# Set where the process ends. A thread that is late must not start a child then.
_stop = threading.Event()
_process = os.getpid()
_threads: dict[int, threading.Thread] = {}


def publish(index: int, verdicts: Mapping[str, Verdict]) -> None:
    """Hands a device's verdicts to ``auto``."""
    _C.set_verdicts(index, {family: (v.verdict, v.reason) for family, v in verdicts.items()})


def missing(
    families: Iterable[str], known: Mapping[str, Verdict], since: float = 0.0, retry: bool = False, force: bool = False
) -> list[str]:
    """Families that have no verdict, or one that should be found anew.

    Args:
        since: a time; what was found after it is new enough.
        retry: whether ``unknown`` is found anew at once, not when it is due.
        force: whether every verdict is found anew.
    """
    now = time.time()

    def is_missing(family: str) -> bool:
        verdict = known.get(family)
        if verdict is None:
            return True
        old = verdict.time < since
        return verdict.is_due(now) or (old and (force or (retry and verdict.verdict == "unknown")))

    return [family for family in families if is_missing(family)]


def verify_missing(
    subject: Subject,
    store: Store,
    families: Sequence[str] | None = None,
    shown: Progress | None = None,
    timeout: float = runner.TIMEOUT_S,
    jobs: int | None = None,
    background: bool = False,
    retry: bool = False,
    force: bool = False,
    stop: threading.Event = _stop,
) -> None:
    """Verifies what has no verdict yet; where another process is at it, waits for what that one finds.

    Every verdict is kept and published when it is there. What stays unknown is not tried twice here. The arguments are
    those of :func:`bap_kernels.verify.verify`, :func:`missing` and :func:`bap_kernels.verify.runner.run`.
    """
    since, tried = time.time(), set()
    seen = store.load(subject.facts)
    publish(subject.index, seen)

    def keep(family: str, verdict: Verdict) -> None:
        tried.add(family)
        store.save(subject.facts, {family: verdict})
        publish(subject.index, store.load(subject.facts))
        if shown:
            shown.verdict(family, verdict)

    def left(known: Mapping[str, Verdict]) -> list[str]:
        asked = subject.families if families is None else families
        return [family for family in missing(asked, known, since, retry, force) if family not in tried]

    while not stop.is_set():
        known = store.load(subject.facts)
        if known != seen:
            publish(subject.index, known)
            seen = known
        if not left(known):
            return
        lock = store.begin(subject.facts)
        if lock is None:
            stop.wait(_POLL_S)
            continue
        try:
            # The process that had the lock may have finished in the meantime.
            wanted = left(store.load(subject.facts))
            step = shown.step if shown else None
            runner.run(wanted, subject, keep, step, timeout, jobs, background, stop)
        finally:
            store.end(lock)


def _may_start() -> bool:
    """Whether this process starts verifiers: neither a verifier's child nor a worker of somebody else's."""
    forked = os.getpid() != _process
    return settings.verify != "0" and not forked and not multiprocessing.current_process().daemon


def _in_background(subject: Subject, store: Store) -> None:
    # Whatever happens here is no concern of the user's, whose calls go through ATen meanwhile.
    with contextlib.suppress(Exception):
        verify_missing(subject, store, background=True)


def first_use(index: int, subject_of: Callable[[int], Subject] = cuda_subject, store: Store | None = None) -> None:
    """Publishes the verdicts that are known of a device, and has the others found.

    The library calls it once for each device, outside captures. It returns at once unless ``BAP_KERNELS_VERIFY`` is
    ``block``, and raises nothing.
    """
    if subject_of is cuda_subject and cuda_problem() is not None:
        return  # simulated by a test
    try:
        subject = subject_of(index)
        store = store or Store(settings.cache_dir)
        known = store.load(subject.facts)
        publish(index, known)
        if not _may_start() or not missing(subject.families, known):
            return
        if settings.verify == "block":
            verify_missing(subject, store)
            return
        thread = threading.Thread(target=_in_background, args=(subject, store), name="bap_kernels-verify", daemon=True)
        _threads[index] = thread
        thread.start()
    except Exception as error:
        warn(f"bap_kernels: the kernels for cuda:{index} are not verified, so `auto` leaves them out: {error}.")


def _at_exit() -> None:
    _stop.set()
    runner.kill_all()


_C.set_verify_hook(first_use)
atexit.register(_at_exit)
