"""Verdicts on disk: one JSON file in the cache folder, for every device and build that was verified.

Nothing here raises because of the file or its folder: what cannot be read counts as empty, what cannot be written stays
in memory, and one warning says so. The file is replaced as a whole under a lock; another lock, which dies with its
process, says that a device is being verified.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from bap_kernels._files import read_text, write_text
from bap_kernels._warn import warn
from bap_kernels.verify.verdict import Verdict

__all__ = ["Store", "key_of"]

_MOST_DEVICES = 32
_PATIENCE_S = 5.0
_Table = dict[str, Verdict]

# Descriptors of locks. A forked child, such as a worker of a DataLoader, would hold them when its parent is gone.
_held: set[int] = set()
# By file, then by key: the verdicts of this process, which count where the file cannot be used.
_memory: dict[Path | None, dict[str, _Table]] = {}
_guard = threading.RLock()
_damaged: set[Path] = set()


def _close_in_child() -> None:
    global _guard
    for handle in _held:
        with contextlib.suppress(OSError):
            os.close(handle)
    _held.clear()
    _guard = threading.RLock()


os.register_at_fork(after_in_child=_close_in_child)


def key_of(facts: Mapping[str, str]) -> str:
    """A short name of what verdicts hold for."""
    return hashlib.blake2b(json.dumps(dict(facts), sort_keys=True).encode(), digest_size=8).hexdigest()


def _unlock(handle: int) -> None:
    _held.discard(handle)
    with contextlib.suppress(OSError):
        # Closing alone would leave it to a child that is being forked.
        fcntl.flock(handle, fcntl.LOCK_UN)
    with contextlib.suppress(OSError):
        os.close(handle)


class Store:
    """The verdicts of all devices.

    Args:
        folder: where the file is; None keeps them in memory.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.file = None if folder is None else folder / "verdicts-v1.json"

    def load(self, facts: Mapping[str, str]) -> _Table:
        """The verdicts that hold for a device with these facts."""
        key = key_of(facts)
        with _guard:
            return {**self._read().get(key, {}).get("families", {}), **_memory.get(self.file, {}).get(key, {})}

    def save(self, facts: Mapping[str, str], verdicts: Mapping[str, Verdict]) -> None:
        """Adds verdicts to those of a device, in place of older ones of the same families."""
        key = key_of(facts)
        with _guard:
            known = self.load(facts)
            new = {family: _counted(verdict, known.get(family)) for family, verdict in verdicts.items()}
            _memory.setdefault(self.file, {}).setdefault(key, {}).update(new)
            if self.file is None:
                return
            with self._locked():
                devices = self._read()
                table = {**devices.get(key, {}).get("families", {}), **new}
                devices[key] = {"facts": dict(facts), "families": table}
                latest = sorted(devices, key=lambda each: max(v.time for v in devices[each]["families"].values()))
                content = [
                    {
                        "facts": devices[each]["facts"],
                        "families": {name: v.as_dict() for name, v in sorted(devices[each]["families"].items())},
                    }
                    for each in latest[-_MOST_DEVICES:]
                ]
                write_text(self.file, json.dumps({"format": 1, "devices": content}, indent=1) + "\n")

    def begin(self, facts: Mapping[str, str]) -> int | None:
        """Takes the lock of those who verify a device; None if another process has it, else to be given to ``end``."""
        if self.folder is None:
            return -1
        return self._take(self.folder / f"verifying-{key_of(facts)}.lock")

    def end(self, lock: int) -> None:
        """Releases the lock."""
        if lock >= 0:
            _unlock(lock)

    def _read(self) -> dict[str, dict[str, Any]]:
        """By key: facts, and the verdicts of families."""
        text = read_text(self.file) if self.file is not None else None
        if text is None:
            return {}
        try:
            content = json.loads(text)
            stored = {}
            for each in content["devices"]:
                facts = {str(name): str(fact) for name, fact in each["facts"].items()}
                families = {str(name): Verdict.from_dict(v) for name, v in each["families"].items()}
                if families:
                    stored[key_of(facts)] = {"facts": facts, "families": families}
            return stored
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            assert self.file is not None
            if self.file not in _damaged:
                _damaged.add(self.file)
                warn(
                    f"bap_kernels: the verdicts on this GPU's kernels are found anew, for `{self.file}` is damaged: "
                    f"{type(error).__name__}: {str(error)[:100]}."
                )
            return {}

    def _take(self, path: Path) -> int | None:
        """A descriptor with the lock; None if another process has it, -1 where there are no locks."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)
        except OSError:
            return -1
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            return None if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN) else -1
        _held.add(handle)
        return handle

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Keeps other processes from replacing the file; after some seconds goes on without."""
        assert self.folder is not None
        deadline, handle = time.monotonic() + _PATIENCE_S, None
        while handle is None and time.monotonic() < deadline:
            handle = self._take(self.folder / "verdicts-v1.lock")
            if handle is None:
                time.sleep(0.02)
        try:
            yield
        finally:
            if handle is not None and handle >= 0:
                _unlock(handle)


def _counted(verdict: Verdict, before: Verdict | None) -> Verdict:
    again = before is not None and before.verdict == verdict.verdict == "unknown"
    return replace(verdict, tries=before.tries + 1) if again and before is not None else verdict
