"""A verifier's child: judges one family in a process that may crash or hang.

    python -m bap_kernels.verify.child REQUEST

Started by :mod:`bap_kernels.verify.runner`, which gives it a pipe for its messages, one line of JSON each.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch

from bap_kernels.verify.verdict import Verdict

__all__ = ["die_with_parent", "judge", "load"]

_PR_SET_PDEATHSIG = 1
# What the device, its driver or somebody else on it is to be blamed for.
_NOT_OURS = (
    "out of memory",
    "busy or unavailable",
    "no cuda-capable device",
    "uncorrectable ecc",
    "driver shutting down",
    "fallen off the bus",
    "system not yet initialized",
    "mps ",
)


def die_with_parent(parent: int) -> None:
    """Has the kernel kill this process when the one that started it ends in whatever way."""
    # Only Linux has it.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def load(name: str) -> Any:
    """The object of "module:name"."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:300]}" if lines else type(error).__name__


def blame(error: BaseException) -> tuple[str, str]:
    """What an exception of a case says of the family: a verdict and why."""
    text = _first_line(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(each in text.lower() for each in _NOT_OURS):
        return "unknown", text
    if isinstance(error, AssertionError):
        return "wrong", text.removeprefix("AssertionError: ").removeprefix("Wrong: ")
    if isinstance(error, NotImplementedError):
        return "unknown", f"not run: {text}"
    return "crash", text


def judge(family: str, device: Any, checks: Callable[[str, Any], Iterable[Any]], step: Callable[[str], None]) -> Any:
    """The verdict on a family: the first case that fails decides.

    Args:
        checks: gives the cases, which have ``text`` and ``run(device, step)``.
        step: is told what follows.
    """
    count = 0
    text = "the cases"
    try:
        for check in checks(family, device):
            text = check.text
            check.run(device, lambda what, text=text: step(f"{text}: {what}"))
            count += 1
    except Exception as error:  # whatever a kernel makes torch or Triton raise
        verdict, reason = blame(error)
        return Verdict(verdict, f"{text}: {reason}")
    if count == 0:
        return Verdict("unknown", "none of the calls that are tried runs it here")
    return Verdict("ok", f"{count} cases")


def main(request: str) -> None:
    """Judges the family of a request; ends the process, whatever a kernel has left of it."""
    asked = json.loads(request)
    die_with_parent(asked["parent"])
    os.nice(asked["nice"])
    pipe = os.fdopen(asked["pipe"], "w", encoding="utf-8", buffering=1)

    def send(**message: Any) -> None:
        pipe.write(json.dumps(message) + "\n")
        pipe.flush()

    def finish(verdict: Verdict) -> None:
        send(verdict=verdict.verdict, reason=verdict.reason)
        sys.stdout.flush()
        sys.stderr.flush()
        # Without the destructors of a context that may be broken.
        os._exit(0)

    try:
        device = load(asked["device"])()
        device.open()
        checks = load(asked["checks"])
    except Exception as error:  # no kernel has run yet
        finish(Verdict("unknown", f"the device cannot be used: {_first_line(error)}"))
    send(ready=True)
    finish(judge(asked["family"], device, checks, lambda what: send(step=what)))


if __name__ == "__main__":
    main(sys.argv[1])
