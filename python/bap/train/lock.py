"""One run at a time writes to a folder: a lock of the operating system, released when its process ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bap.files import FileError

__all__ = ["LOCK", "LockedError", "folder_lock"]

LOCK = ".lock"
_WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


class LockedError(FileError):
    """Another run writes into the folder."""


# {folder: (file descriptor, thread, depth)}: a thread may lock a folder again that it holds.
_held: dict[str, tuple[int, int, int]] = {}
_guard = threading.Lock()


def _close_in_child() -> None:
    # A forked child, such as a DataLoader's worker, would keep the lock after its parent was killed.
    global _guard
    for handle, _, _ in _held.values():
        os.close(handle)
    _held.clear()
    _guard = threading.Lock()


os.register_at_fork(after_in_child=_close_in_child)


def _holder(path: Path) -> str:
    try:
        read = json.loads(path.read_text())
        return f"process {int(read['pid'])} on {read['host']}"
    except (OSError, ValueError, TypeError, KeyError):
        return "another process"


def _take(path: Path) -> int:
    """An open descriptor with the lock; the file is created if it is missing."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise LockedError(
                    f"folder_lock(): expected no other run in {path.parent}, got {_holder(path)}. Hint: wait for it, "
                    "or choose another folder."
                ) from None
            except OSError as error:
                if error.errno not in _WITHOUT_LOCKS:
                    raise
                warnings.warn(
                    f"folder_lock(): the file system of {path.parent} has no locks ({error.strerror}). Make sure "
                    "yourself that no second run writes there: two runs at once would mix their files.",
                    stacklevel=4,
                )
            # The file may have been removed, by the one who had the lock, between opening and locking it.
            try:
                same = os.stat(path).st_ino == os.fstat(handle).st_ino
            except FileNotFoundError:
                same = False
            if same:
                os.ftruncate(handle, 0)
                os.pwrite(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


@contextmanager
def folder_lock(folder: str | Path | None) -> Iterator[None]:
    """Keeps other runs out of a folder, which is created if it is missing.

    The lock is ``flock``'s, on a file ``.lock`` that names the process: after a SIGKILL or a crash of the machine the
    next run takes it over. A thread that holds the lock may take it again. Readers need no lock: files are replaced as
    a whole.

    Args:
        folder: of the run; None: nothing is locked.

    Raises:
        LockedError: if another process or thread holds it.
        FileError: if the folder cannot be written.

    Examples:
        >>> import tempfile
        >>> from bap.train.lock import folder_lock
        >>> with tempfile.TemporaryDirectory() as folder, folder_lock(folder), folder_lock(folder):
        ...     print("locked twice by one thread")
        locked twice by one thread
    """
    if folder is None:
        yield
        return
    path = Path(folder)
    me = threading.get_ident()
    try:
        path.mkdir(parents=True, exist_ok=True)
        key = str(path.resolve())
        with _guard:
            if key in _held:
                handle, owner, count = _held[key]
                if owner != me:
                    raise LockedError(
                        f"folder_lock(): expected no other run in {path}, got one in another thread of this process."
                    )
                _held[key] = handle, owner, count + 1
            else:
                _held[key] = _take(path / LOCK), me, 1
    except OSError as error:
        raise FileError(f"folder_lock(): expected a folder {path} to write to, got {error}.") from None
    try:
        yield
    finally:
        with _guard:
            if key in _held:
                handle, owner, count = _held[key]
                if count > 1:
                    _held[key] = handle, owner, count - 1
                else:
                    del _held[key]
                    # Before the lock is released: a process that opened it meanwhile checks that it still exists.
                    with contextlib.suppress(OSError):
                        (path / LOCK).unlink(missing_ok=True)
                    os.close(handle)
