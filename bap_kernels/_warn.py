"""Warnings of the package, placed in the line of the caller's own code that led to them."""

from __future__ import annotations

import sys
import warnings

from bap_kernels._load import _C

__all__ = ["warn"]

_OURS = ("bap_kernels", "torch")


def warn(text: str) -> None:
    """Issues a ``UserWarning`` at the innermost frame that is neither ours nor torch's.

    The C++ part calls it too, from any thread, also from one of torch's that has no frame of Python.
    """
    # `warnings` has skip_file_prefixes only from Python 3.12 on.
    frame, level = sys._getframe().f_back, 2
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _OURS:
        frame, level = frame.f_back, level + 1
    warnings.warn(text, UserWarning, stacklevel=level if frame is not None else 1)


_C.set_warn(warn)
