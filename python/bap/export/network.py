"""One domain of a network as a file of another runtime, compared with the plan and timed beside it."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bap_kernels as bk
from bap.export.formats import FORMATS, unavailable_reason
from bap.prune.prune import PruneError

__all__ = ["ExportError", "Exported", "export_domain"]

# Idle threads of one runtime spin for some milliseconds, on the cores that the next one needs.
_SPIN_SECONDS = 0.02
# Calls of a runtime in each of its turns. The first wake its own threads, and are not timed.
_UNTIMED_CALLS, _CALLS = 3, 5


class ExportError(PruneError):
    """An exported file does not compute what the network does."""


@dataclass(frozen=True)
class Exported:
    """A file that was written, and what its runtime makes of it.

    Args:
        domain: whose network it is.
        format: of :data:`bap.export.FORMATS`.
        file: its path.
        bytes: of all files that belong to it.
        change: largest difference from the plan's output, relative to the largest output.
        milliseconds: median of one call in its runtime.
        plan_milliseconds: of the plan, in the same interleaved run.
    """

    domain: str
    format: str
    file: str
    bytes: int
    change: float
    milliseconds: float
    plan_milliseconds: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON and tables."""
        return {**asdict(self), "over plan": self.plan_milliseconds / self.milliseconds}


def export_domain(
    model: nn.Module,
    domain: str,
    example: Tensor,
    folder: Path,
    formats: list[str],
    tolerance: float = 1e-4,
    rounds: int = 15,
) -> list[Exported]:
    """Writes one domain of a network in some formats, runs every file again, and compares it with the plan.

    Args:
        model: a network with lists, in eval mode, such as :attr:`bap.prune.deploy.Deployed.model`.
        domain: whose channels are kept.
        example: (N, C, H, W), float32; the files take this shape.
        folder: for ``<domain><suffix>`` of each format.
        formats: names of :data:`bap.export.FORMATS`.
        tolerance: largest change that rounding explains, relative to the largest output.
        rounds: timed calls of which the medians are taken, rounded up to a multiple of 5.

    Raises:
        ValueError: for an unknown format.
        ImportError: for a format whose packages are not installed.
        ExportError: if a file gives another result; it is left for inspection.
    """
    for name in formats:
        if name not in FORMATS:
            raise ValueError(f"export_domain(): expected `formats` to name only {', '.join(FORMATS)}, got {name!r}.")
        if reason := unavailable_reason(FORMATS[name]):
            raise ImportError(f"export_domain(): expected the packages of format {name!r}, got: {reason}.")
    folder.mkdir(parents=True, exist_ok=True)
    bk.set_domain(model, domain)
    small = bk.specialize(model, domain, example)
    planned = bk.plan(model, example, domain)
    x = torch.randn(example.shape, generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    results = []
    with torch.inference_mode():
        expected = planned(x)
        for name in formats:
            format = FORMATS[name]
            path = folder / f"{domain}{format.suffix}"
            before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
            format.write(small, example, path)
            written = [file for file in folder.iterdir() if before.get(file) != file.stat().st_mtime_ns]
            run = format.load(path, threads)
            change = float((run(x) - expected).abs().max() / expected.abs().max())
            if not change <= tolerance:
                raise ExportError(
                    f"export_domain(): expected {path} to give the plan's outputs within {tolerance:g}, "
                    f"got a change of {change:.3g}."
                )
            times: dict[str, list[float]] = {"plan": [], name: []}
            for _ in range(-(-rounds // _CALLS)):
                for called, call in (("plan", planned), (name, run)):
                    time.sleep(_SPIN_SECONDS)
                    for number in range(_UNTIMED_CALLS + _CALLS):
                        started = time.perf_counter()
                        call(x)
                        if number >= _UNTIMED_CALLS:
                            times[called].append(1e3 * (time.perf_counter() - started))
            size = sum(file.stat().st_size for file in written)
            medians = {called: statistics.median(values) for called, values in times.items()}
            results.append(Exported(domain, name, str(path), size, change, medians[name], medians["plan"]))
    return results
