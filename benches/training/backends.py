"""Backends of the package that are timed beside ``auto``: on a GPU, those that have to be named there."""

from collections.abc import Callable, Sequence

import torch
from rich.console import Console

from benches import ours
from benches.gate import WrongResultError

# On a GPU ``auto`` trains through PyTorch's own operators, as ``aten`` does.
NAMED = {"cpu": (), "cuda": ("cuda", "triton")}


def device_of(name: str) -> torch.device:
    """Return the device that ``--device`` names, with TF32 off on a GPU and cuDNN's algorithms chosen by measuring.

    Raises:
        ValueError: If there is none.
    """
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(
                "training: expected `--device` to be one of this machine, got cuda, and PyTorch sees no GPU. "
                "Hint: leave --device out to measure on the CPU."
            )
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return device


def named_backends(device: torch.device, console: Console) -> list[str]:
    """Return the backends to name on a device; the reasons of those that cannot run are shown."""
    reasons = {name: ours.why_not(name, device, torch.float32) for name in NAMED[device.type]}
    for name, reason in reasons.items():
        if reason:
            console.print(f"Not measured: {name} ({reason})", highlight=False)
    return [name for name, reason in reasons.items() if not reason]


def gated(
    names: Sequence[str], check: Callable[[str], float], left_out: list[str], required: Sequence[str]
) -> dict[str, float]:
    """Check variants, and return the errors of those that are right.

    Args:
        names: Variants.
        check: Given a name, returns its largest error.
        left_out: Gets the reasons of named backends that cannot run a cell, or do it wrong.
        required: Variants of which that is an error.

    Raises:
        WrongResultError: If a required variant is wrong.
        NotImplementedError: If it cannot run.
    """
    errors = {}
    for name in names:
        try:
            errors[name] = check(name)
        except (WrongResultError, NotImplementedError) as reason:
            if name in required:
                raise
            left_out.append(str(reason))
    return errors
