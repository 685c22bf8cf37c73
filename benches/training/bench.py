"""Common parts of the benches of training: opt-in backends, the gate, and the phases of a run."""

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import TypeVar

import torch

from benches import memory
from benches.gate import WrongResultError
from benches.timers import Marks, Timed, clock, interleave

CPU = torch.device("cpu")
# On a GPU ``auto`` trains through PyTorch's own operators, as ``aten`` does.
OPT_IN = {"cpu": (), "cuda": ("cuda", "triton")}

_Timed = TypeVar("_Timed", bound=Timed)


class TrainingBench:
    """Measures cells one after the other.

    Args:
        peaks: Whether to measure peak memory, if the system can.
        device: ``cpu`` or ``cuda``.
    """

    min_rounds: Mapping[str, int]
    max_rounds: Mapping[str, int]

    def __init__(self, peaks: bool = True, device: torch.device = CPU) -> None:
        self.device = device
        self.clock = clock(device)
        self.peaks = peaks and (device.type == "cuda" or memory.can_measure_peak())
        # Reasons for missing backends.
        self.skipped: list[str] = []

    def samples(self, variants: Mapping[str, _Timed], seconds: float) -> dict[str, list[float]]:
        """Time the variants in interleaved rounds."""
        kind = self.device.type
        return interleave(variants, self.clock, seconds, self.min_rounds[kind], self.max_rounds[kind])


def phases(marks: Sequence[Marks]) -> dict[str, float]:
    """Median seconds of the phases of a run, by field of `benches.rows.Row`."""
    seconds = zip(*(run.seconds() for run in marks), strict=True)
    return dict(zip(("forward_s", "backward_s", "optimiser_s"), map(median, seconds), strict=False))


def passing(
    names: Sequence[str], check: Callable[[str], float], skipped: list[str], required: Sequence[str]
) -> dict[str, float]:
    """Check variants; return the largest errors of those that pass.

    Args:
        names: Variants.
        check: Returns the largest error of a variant.
        skipped: Receives the reasons for backends that cannot run a cell or are wrong.
        required: Variants that must pass.

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
            skipped.append(str(reason))
    return errors
