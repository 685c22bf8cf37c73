"""Which kernel families this GPU runs correctly, found in separate processes, so that a fault does no harm.

See the guide's page on GPUs for what is verified and when.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bap_kernels.settings import settings
from bap_kernels.verify import runner, trigger
from bap_kernels.verify.families import matching
from bap_kernels.verify.show import progress, summary, table
from bap_kernels.verify.store import Store
from bap_kernels.verify.subject import Subject, cuda_problem, cuda_subject
from bap_kernels.verify.verdict import VERDICTS, Verdict

__all__ = ["VERDICTS", "Verdict", "VerifyReport", "known_verdicts", "verify", "verify_subject"]


@dataclass(frozen=True)
class VerifyReport(Mapping[str, Verdict]):
    """Verdicts by family, those of a device; printing it shows a table.

    Attributes:
        facts: what the verdicts hold for: GPU, driver, versions, builds.
        verdicts: by family, in the order in which they are verified.
        file: where they are kept; None: in memory.
    """

    facts: Mapping[str, str]
    verdicts: Mapping[str, Verdict]
    file: Path | None

    def __getitem__(self, family: str) -> Verdict:
        return self.verdicts[family]

    def __iter__(self) -> Iterator[str]:
        return iter(self.verdicts)

    def __len__(self) -> int:
        return len(self.verdicts)

    @property
    def ok(self) -> bool:
        """Whether every family has the verdict ``ok``."""
        return all(each.verdict == "ok" for each in self.verdicts.values())

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "facts": dict(self.facts),
            "ok": self.ok,
            "families": {family: verdict.as_dict() for family, verdict in self.verdicts.items()},
        }

    def __str__(self) -> str:
        facts = ", ".join(f"{name} {fact}" for name, fact in self.facts.items() if name not in ("gpu",))
        return f"{self.facts.get('gpu', 'device')}: {summary(self)}\n({facts})\n\n{table(self)}"


def _index_of(device: Any) -> int:
    problem = cuda_problem()
    if problem is not None:
        raise RuntimeError(
            f"verify(): expected a CUDA device to verify the kernels on, got none: {problem}. Hint: the CPU kernels "
            "need no verification; bap_kernels.info() lists what runs here."
        )
    count = torch.cuda.device_count()
    if device is None:
        return torch.cuda.current_device()
    try:
        target = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    except RuntimeError:
        target = torch.device("cpu")
    index = torch.cuda.current_device() if target.index is None else target.index
    if target.type != "cuda" or not 0 <= index < count:
        raise ValueError(f"verify(): expected `device` to be one of {count} CUDA devices, got {device!r}.")
    return index


def _check_options(timeout: float, jobs: int | None) -> None:
    if not timeout > 0:
        raise ValueError(f"verify(): expected `timeout` to be a positive number of seconds, got {timeout!r}.")
    if jobs is not None and jobs < 1:
        raise ValueError(f"verify(): expected `jobs` to be at least 1, got {jobs!r}.")


def verify(
    device: int | str | torch.device | None = None,
    families: Sequence[str] | None = None,
    timeout: float = runner.TIMEOUT_S,
    jobs: int | None = None,
    force: bool = False,
    show: bool = False,
) -> VerifyReport:
    """Finds out which kernel families a GPU runs correctly, and has ``auto`` take those.

    Each family is judged in a process of its own, several side by side: small and ragged cases with every tile,
    buffers between NaN, repeats that must be equal to the bit, another stream, a captured graph. Verdicts are kept in
    ``BAP_KERNELS_CACHE_DIR`` for this GPU, driver and build; ``auto`` finds them by itself at its first call on a
    device, in the background. Also ``python -m bap_kernels.verify``.

    Args:
        device: a CUDA device; None: the current one.
        families: names, patterns such as ``"triton/*/bfloat16"``, or ``"main"``, which is what plain inference in
            bfloat16 and TF32 needs; None: all that the device can run.
        timeout: seconds that one call may take, its compilation included, before the family counts as hanging.
        jobs: processes side by side; None: as many as cores and memory allow.
        force: whether families are judged again that have a verdict; those that are ``unknown`` always are.
        show: whether progress is shown on stderr.

    Returns:
        The verdicts of all families asked for.

    Raises:
        RuntimeError: if there is no CUDA device.
        ValueError: if there is no such device or family, or ``timeout`` or ``jobs`` is not positive.

    Examples:
        >>> import bap_kernels as bk
        >>> bk.verify(families=["*/forward/*"])  # doctest: +SKIP
    """
    _check_options(timeout, jobs)
    return verify_subject(cuda_subject(_index_of(device)), families, timeout, jobs, force, show)


def verify_subject(
    subject: Subject,
    families: Sequence[str] | None = None,
    timeout: float = runner.TIMEOUT_S,
    jobs: int | None = None,
    force: bool = False,
    show: bool = False,
) -> VerifyReport:
    """As :func:`verify`, of any device that a child can compute on."""
    asked = subject.families if families is None else matching(families, subject.families)
    store = Store(settings.cache_dir)
    count = len(trigger.missing(asked, store.load(subject.facts), math.inf, retry=True, force=force))
    with progress(count, show and count > 0) as shown:
        trigger.verify_missing(subject, store, asked, shown, timeout, jobs, retry=True, force=force)
    known = store.load(subject.facts)
    return VerifyReport(subject.facts, {family: known[family] for family in asked if family in known}, store.file)


def known_verdicts(subject: Subject) -> VerifyReport:
    """The verdicts that are stored of a device; nothing is started."""
    store = Store(settings.cache_dir)
    known = store.load(subject.facts)
    return VerifyReport(subject.facts, {each: known[each] for each in subject.families if each in known}, store.file)
