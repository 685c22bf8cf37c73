"""What a verifier finds of a family of kernels on a device."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["VERDICTS", "Verdict"]

VERDICTS = ("ok", "wrong", "crash", "hang", "unknown")
_FIRST_WAIT_S, _LONGEST_WAIT_S = 600.0, 86400.0


@dataclass(frozen=True)
class Verdict:
    """One family's verdict.

    Attributes:
        verdict: ``ok``: all cases are right. ``wrong``: a result, a repeat or the memory around a buffer is not what it
            has to be. ``crash``: the process or its CUDA context died, or the kernel raised. ``hang``: a call did not
            return. ``unknown``: the device or the machine kept the verifier from finding out.
        reason: in words, with the case; of ``ok``, how many cases there were.
        seconds: what it took.
        time: when it was found, in seconds since 1970.
        tries: how often in a row it stayed ``unknown``, this time included.
    """

    verdict: str
    reason: str = ""
    seconds: float = 0.0
    time: float = field(default_factory=time.time)
    tries: int = 1

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise ValueError(f"Verdict(): expected `verdict` to be one of {', '.join(VERDICTS)}, got {self.verdict!r}.")

    def is_due(self, now: float) -> bool:
        """Whether it should be found anew: ``unknown``, after 10 minutes, then twice as long each time, up to a day.

        Examples:
            >>> from bap_kernels.verify import Verdict
            >>> second = Verdict("unknown", "out of memory", time=0.0, tries=2)
            >>> second.is_due(now=1100.0), second.is_due(now=1200.0), Verdict("hang", time=0.0).is_due(now=1e9)
            (False, True, False)
        """
        wait = min(_FIRST_WAIT_S * 2.0 ** min(self.tries - 1, 20), _LONGEST_WAIT_S)
        # A clock that was set back must not keep it for ever.
        return self.verdict == "unknown" and not 0 <= now - self.time < wait

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Verdict:
        """From :meth:`as_dict`.

        Raises:
            KeyError, TypeError, ValueError: where it is something else.
        """
        numbers = float(content["seconds"]), float(content["time"]), int(content["tries"])
        return cls(str(content["verdict"]), str(content["reason"]), *numbers)
