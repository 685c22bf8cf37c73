"""Common parts of the studies' command lines: options, tasks, progress, header and journal."""

import argparse
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benches import memory, ours
from benches.machine import Roofline, describe, measure_roofline
from benches.measure import DTYPES
from benches.rows import Journal, Row
from benches.summary import BUSY, unsteadiness
from benches.tables import Table

# Cores that other processes may keep busy without a word.
_BUSY = 0.3


@dataclass(frozen=True)
class Task:
    """One cell to measure.

    Args:
        id: Of the cell.
        names: Of the variants.
        measure: Returns rows, given seconds.
        network: Whole network; None for a single convolution.
        batch: N.
    """

    id: str
    names: Sequence[str]
    measure: Callable[[float], list[Row]]
    network: str | None = None
    batch: int = 1

    def done(self, journal: Journal, device: str, dtype: str) -> bool:
        """Whether the journal has all rows of the task (oracle8 is left out if it equals oracle)."""
        keys = {row.key for row in journal.rows}
        threads = torch.get_num_threads()
        return all((self.id, name, device, dtype, threads) in keys for name in self.names if name != "oracle8")


def numbers(kind: type, examples: Sequence[float]) -> Callable[[str], list[Any]]:
    """Return a parser of comma-separated positive numbers, floats at most 1; ``examples`` are for the message."""

    def parse(text: str) -> list[Any]:
        values = [kind(part) for part in text.split(",")]
        if any(value <= 0 or (kind is float and value > 1) for value in values):
            raise argparse.ArgumentTypeError(f"expected positive values such as {examples}, got {text}")
        return values

    return parse


def common_options(command: argparse.ArgumentParser, out: str, budget_seconds: float) -> None:
    """Add the options that the studies share.

    Args:
        command: The command line.
        out: Default folder of the report.
        budget_seconds: Default time to spend.
    """
    command.add_argument("--out", type=Path, default=Path(out), help="folder of the report (default: %(default)s)")
    command.add_argument(
        "--budget-seconds", type=float, default=budget_seconds, help="time to spend (default: %(default)s)"
    )
    command.add_argument("--fresh", action="store_true", help="delete the rows of an earlier run")
    command.add_argument("--threads", type=int, help="threads (default: PyTorch's)")
    regex: dict[str, Any] = {"type": re.compile, "default": re.compile(""), "metavar": "REGEX"}
    command.add_argument("--only", **regex, help="cells whose id matches")
    command.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")


def device_of(name: str) -> torch.device:
    """Return a device; on a GPU, TF32 is turned off and cuDNN chooses algorithms by measuring.

    Raises:
        ValueError: If there is no GPU.
    """
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(
                "benches: expected `--device` to be available, got cuda, but PyTorch sees no GPU. "
                "Hint: leave out --device to measure on the CPU."
            )
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return device


def available_backends(names: Sequence[str], device: torch.device, dtype: torch.dtype, console: Console) -> list[str]:
    """Return the backends that can run here; print the reasons for the others."""
    reasons = {name: ours.unsupported_reason(name, device, dtype) for name in names}
    for name, reason in reasons.items():
        if reason:
            console.print(f"Not measured: {name} ({reason})", highlight=False)
    return [name for name, reason in reasons.items() if not reason]


def run_tasks(
    tasks: Sequence[Task],
    journal: Journal,
    progress: Progress,
    title: str,
    deadline: float,
    max_seconds: float,
    dtype: str,
    device: str,
) -> int:
    """Measure tasks until the deadline, each with its share of the remaining time.

    Args:
        tasks: In order of importance.
        journal: Receives the rows; tasks with all rows are skipped.
        progress: Gets a bar.
        title: Of the bar.
        deadline: Value of `time.perf_counter` after which no task starts.
        max_seconds: Time for one task at most.
        dtype: Of the rows.
        device: Of the rows.

    Returns:
        Number of tasks that have rows.
    """
    bar = progress.add_task(title, total=len(tasks), cell="")
    finished = 0
    # Whole networks cannot be cut short: seconds and batch of the last task of each predict the next one.
    last: dict[str | None, tuple[float, int]] = {}
    for i, task in enumerate(tasks):
        if not task.done(journal, device, dtype):
            start = time.perf_counter()
            remaining = deadline - start
            seconds, batch = last.get(task.network, (0.0, 1)) if task.network else (0.0, 1)
            # About half of a network's time does not grow with the batch.
            if remaining <= seconds * max(1.0, task.batch / batch / 2):
                continue
            progress.update(bar, cell=task.id)
            journal.append(task.measure(min(max_seconds, remaining / (len(tasks) - i))))
            last[task.network] = time.perf_counter() - start, task.batch
        finished += 1
        progress.advance(bar)
    progress.update(bar, cell="")
    return finished


def progress_bars(console: Console) -> Progress:
    """Return the progress display of a study."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[cell]}"),
        console=console,
    )


def warn_if_busy(console: Console, rows: Sequence[Row]) -> None:
    """Print a warning if other processes disturbed the study."""
    if (spread := unsteadiness(rows)) > BUSY:
        console.print(
            f"[yellow]The machine was busy (median of p80 / p20 is {spread:.2f}): do not trust the results.[/]"
        )


def wide_console() -> Console:
    """Return a console that is wide enough for the tables if the output is a file."""
    console = Console()
    return console if console.is_terminal else Console(width=128)


def begin(
    options: argparse.Namespace,
    console: Console,
    device: torch.device,
    dtype: str,
    fresh: bool = False,
    with_package: bool = True,
) -> tuple[dict[str, Any], Roofline, Journal]:
    """Measure the machine's peaks and open the journal of ``options.out``.

    Args:
        options: With ``out`` and ``threads``.
        console: For messages.
        device: ``cpu`` or ``cuda``.
        dtype: ``float32`` or ``bfloat16``.
        fresh: Whether to delete the rows of an earlier run.
        with_package: Whether the package is measured and the header describes its build.

    Returns:
        Header of the report, peaks, journal.

    Raises:
        ValueError: If the folder holds rows of another build or machine.
        PackageMissingError: If the package cannot be imported.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    memory.keep_freed()
    build, isa = (dict(ours.library().build_info()), ours.library().isa()) if with_package else ({}, "none")
    console.print(f"Measuring the machine's peaks with {torch.get_num_threads()} threads ...")
    roofline = measure_roofline(DTYPES[dtype], device)
    header = describe(device, dtype, roofline, build, isa)
    busy = header["busy_cores"]
    if busy is not None and busy > _BUSY:
        console.print(f"[bold]Other processes keep {busy:.1f} cores busy: expect figures that are far off.[/bold]")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "rows.jsonl"
    if fresh:
        path.unlink(missing_ok=True)
    return header, roofline, Journal(path, header)


def finish(out: Path, console: Console, tables: Iterable[Table], rows: Sequence[Row]) -> None:
    """Print the tables for the screen and the path of the report."""
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
    """Run a study and return its exit status; expected errors are printed in one line."""
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
