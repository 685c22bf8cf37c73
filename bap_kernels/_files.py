"""Small files of measured results in ``BAP_KERNELS_CACHE_DIR``: read and written without ever being in the way."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from pathlib import Path

from bap_kernels._warn import warn

__all__ = ["read_text", "write_text"]

_unusable: set[Path] = set()


def _give_up(path: Path, why: object) -> None:
    if path not in _unusable:
        _unusable.add(path)
        warn(
            f"bap_kernels: measured results stay in memory, for `{path}` cannot be used: {why}. "
            "Hint: BAP_KERNELS_CACHE_DIR names another folder, or none if it is empty."
        )


def read_text(path: Path) -> str | None:
    """The text of a regular file; None where there is none. One that cannot be read is named in one warning."""
    try:
        # A pipe would wait for its other end, and a device may do anything.
        if not stat.S_ISREG(path.stat().st_mode):
            raise OSError("it is no regular file")
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), encoding="utf-8") as stream:
            return stream.read()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        _give_up(path, getattr(error, "strerror", None) or error)
        return None


def write_text(path: Path, text: str) -> None:
    """Replaces a file as a whole or not at all; where that is impossible it is left, and one warning says why."""
    if path in _unusable:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        try:
            with open(handle, "w", encoding="utf-8") as stream:
                stream.write(text)
            Path(name).replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(name).unlink()
            raise
    except OSError as error:
        _give_up(path, error.strerror or error)
