"""Verdicts on the screen: a table, and progress while they are found."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Protocol

from bap_kernels.verify.verdict import VERDICTS, Verdict

__all__ = ["Progress", "progress", "summary", "table"]


def summary(verdicts: Mapping[str, Verdict]) -> str:
    """How many families have which verdict.

    Examples:
        >>> from bap_kernels.verify import Verdict
        >>> from bap_kernels.verify.show import summary
        >>> summary({"cuda/halo/tf32": Verdict("ok"), "cuda/pack/tf32": Verdict("hang")})
        '1 ok, 1 hang'
    """
    counts = Counter(verdict.verdict for verdict in verdicts.values())
    return ", ".join(f"{counts[name]} {name}" for name in VERDICTS if counts[name]) or "none yet"


def table(verdicts: Mapping[str, Verdict]) -> str:
    """One line for each family."""
    rows = [("family", "verdict", "s", "reason")]
    rows += [(family, v.verdict, f"{v.seconds:.1f}", v.reason) for family, v in verdicts.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]).rstrip()
        for row in rows
    ]
    return "\n".join(lines)


class Progress(Protocol):
    """Is told what happens."""

    def step(self, family: str, what: str) -> None:
        """A family's child does something."""

    def verdict(self, family: str, verdict: Verdict) -> None:
        """A family has its verdict."""


class _Silent:
    def step(self, family: str, what: str) -> None:
        pass

    def verdict(self, family: str, verdict: Verdict) -> None:
        pass


class _Lines(_Silent):
    """A line for each verdict."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0

    def verdict(self, family: str, verdict: Verdict) -> None:
        self.done += 1
        line = f"[{self.done}/{self.total}] {family}: {verdict.verdict}, {verdict.reason} ({verdict.seconds:.0f} s)"
        print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def progress(total: int, show: bool = True) -> Iterator[Progress]:
    """A progress bar on stderr where that is a terminal and rich is installed, else a line for each verdict."""
    if not show:
        yield _Silent()
        return
    if not sys.stderr.isatty() or importlib.util.find_spec("rich") is None:
        yield _Lines(total)
        return
    from rich import progress as bars
    from rich.console import Console
    from rich.markup import escape

    columns = (
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(),
        bars.TextColumn("{task.fields[now]}"),
    )
    with bars.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("verify", total=total, now="")

        class _Bar:
            def step(self, family: str, what: str) -> None:
                bar.update(task, now=escape(f"{family}: {what}"[:90]))

            def verdict(self, family: str, verdict: Verdict) -> None:
                colour = {"ok": "green", "unknown": "yellow"}.get(verdict.verdict, "red")
                bar.console.print(f"[{colour}]{verdict.verdict:8}[/] {escape(family)}  {escape(verdict.reason)}")
                bar.advance(task)

        yield _Bar()
