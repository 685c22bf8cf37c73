"""What the studies' command lines share: tasks with their share of the time, the journal they fill, and the report."""

import argparse
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benches import memory, ours
from benches.machine import Roof, describe, measure_roof
from benches.measure import DTYPES
from benches.rows import Journal, Row
from benches.summary import BUSY, unsteadiness
from benches.tables import Table


@dataclass(frozen=True)
class Task:
    """One cell to measure.

    Args:
        id: The cell's id.
        names: Variants that it compares.
        measure: Given seconds, returns rows.
        network: Whole network that is measured; None for a single convolution, which is over soon.
        batch: N.
    """

    id: str
    names: Sequence[str]
    measure: Callable[[float], list[Row]]
    network: str | None = None
    batch: int = 1

    def done(self, journal: Journal, device: str, dtype: str) -> bool:
        """Whether the journal has every row of it (oracle8 is not made where it equals oracle)."""
        keys = journal.done
        threads = torch.get_num_threads()
        return all((self.id, name, device, dtype, threads) in keys for name in self.names if name != "oracle8")


def numbers(kind: type, allowed: Sequence[float]) -> Callable[[str], list[Any]]:
    """Return a parser of comma-separated positive numbers; floats are shares of one, ``allowed`` are examples."""

    def parse(text: str) -> list[Any]:
        values = [kind(part) for part in text.split(",")]
        if any(value <= 0 or (kind is float and value > 1) for value in values):
            raise argparse.ArgumentTypeError(f"expected positive values such as {allowed}, got {text}")
        return values

    return parse


def run_tasks(
    tasks: Sequence[Task],
    journal: Journal,
    progress: Progress,
    title: str,
    deadline: float,
    usual_seconds: float,
    dtype: str,
    device: str,
) -> int:
    """Measure tasks until the deadline, each with its part of the time that is left.

    Args:
        tasks: In order of importance.
        journal: Gets the rows.
        progress: Shows how far it is.
        title: Name of the bar.
        deadline: `time.perf_counter` at which no further task is begun.
        usual_seconds: Time for one task where the deadline is far.
        dtype: For finding what is done already.
        device: Likewise.

    Returns:
        How many tasks have rows now.
    """
    bar = progress.add_task(title, total=len(tasks), what="")
    finished = 0
    # Whole networks cannot be cut short: seconds and batch of the last run of each tell how long the next will take.
    last: dict[str | None, tuple[float, int]] = {}
    for i, task in enumerate(tasks):
        if not task.done(journal, device, dtype):
            start = time.perf_counter()
            left = deadline - start
            seconds, batch = last.get(task.network, (0.0, 1)) if task.network else (0.0, 1)
            # Half of a network's time does not grow with the batch.
            if left <= seconds * max(1.0, task.batch / batch / 2):
                continue
            progress.update(bar, what=task.id)
            journal.append(task.measure(min(usual_seconds, left / (len(tasks) - i))))
            last[task.network] = time.perf_counter() - start, task.batch
        finished += 1
        progress.advance(bar)
    progress.update(bar, what="")
    return finished


def progress_bars(console: Console) -> Progress:
    """Return the bars that show how far a study is."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[what]}"),
        console=console,
    )


def warn_if_busy(console: Console, rows: Sequence[Row]) -> None:
    """Say so where other work has disturbed the study."""
    if (spread := unsteadiness(rows)) > BUSY:
        console.print(
            f"[yellow]The machine was busy (median of p80 / p20 is {spread:.2f}): do not trust the figures.[/]"
        )


def wide_console() -> Console:
    """Return a console for the tables: a log has no width of its own, and they need a little more than the usual 80."""
    console = Console()
    return console if console.is_terminal else Console(width=128)


def begin(
    options: argparse.Namespace,
    console: Console,
    device: torch.device,
    dtype: str,
    fresh: bool = False,
    with_ours: bool = True,
) -> tuple[dict[str, Any], Roof, Journal]:
    """Measure the machine's peaks and open the journal of ``options.out``.

    Args:
        options: With ``out`` and ``threads``.
        console: Told what goes on.
        device: Where to measure.
        dtype: ``float32`` or ``bfloat16``.
        fresh: Whether rows of an earlier run are thrown away.
        with_ours: Whether the package is measured, so that its build belongs to the header.

    Returns:
        The header of the report, the peaks, and the journal.

    Raises:
        ValueError: If the folder holds rows of another build or machine.
        PackageMissingError: If the package is to be measured and cannot be imported.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    memory.keep_freed()
    build, isa = (dict(ours.library().build_facts()), ours.library().isa()) if with_ours else ({}, "none")
    console.print(f"Measuring the machine's peaks with {torch.get_num_threads()} threads ...")
    roof = measure_roof(DTYPES[dtype], device)
    header = describe(device, dtype, roof, build, isa)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "rows.jsonl"
    if fresh:
        path.unlink(missing_ok=True)
    return header, roof, Journal(path, header)


def finish(out: Path, console: Console, tables: Iterable[Table], rows: Sequence[Row]) -> None:
    """Show the tables that are meant for the screen, and say where the report is."""
    for table in tables:
        if table.screen:
            console.print(table.rich())
    warn_if_busy(console, rows)
    console.print(f"Report: {out / 'report.html'} (also report.md, results.json, results.csv, rows.jsonl, plots/)")


def command_line(
    study: Callable[[argparse.Namespace, Console], None],
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    after_interrupt: str = "",
) -> int:
    """Run a study, and return its exit status; errors that a user can mend are one line."""
    console = wide_console()
    try:
        study(parser.parse_args(arguments), console)
    except (ours.PackageMissingError, NotImplementedError, ValueError) as error:
        console.print(f"[red]{error}[/]", highlight=False)
        return 1
    except KeyboardInterrupt:
        console.print(f"Interrupted{after_interrupt}.")
        return 130
    return 0
