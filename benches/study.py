"""The speed-up study: ``python -m benches.study --out DIR``.

Without ``--full`` it measures the embedded default within ``--budget-seconds``; with it, everything, and a study that
was interrupted goes on where it stopped.
"""

import argparse
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benches import ours, report
from benches.cases import BATCHES, DENSITIES, LAYOUTS, LISTS, default_cells, full_cells
from benches.machine import describe, measure_roof
from benches.measure import DTYPES, Bench
from benches.network_memory import network_peaks
from benches.networks import COMPILED, FEW, MIN_ROUNDS, NETWORKS, WHOLE, NetworkBench, network_cells
from benches.overhead import PEERS as OVERHEAD_PEERS
from benches.overhead import measure_overhead
from benches.peers import PEERS
from benches.rows import Journal, Row
from benches.summary import BUSY, OVERHEAD, unsteadiness

BUDGET_SECONDS = 110.0
# Kept free for plots and files.
REPORT_SECONDS = 9.0
# Share of the budget that whole networks get.
NETWORK_SHARE = 0.3
# Time for one cell of a full study, which has no budget.
FULL_LAYER_SECONDS, FULL_NETWORK_SECONDS = 1.0, 6.0
# Of whole networks in a full study; compiling takes its seconds, and three rounds are too few for a report.
FULL_ROUNDS = 10


@dataclass(frozen=True)
class Task:
    """One cell to measure.

    Args:
        id: The cell's id.
        names: Peers that it compares.
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


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    command = argparse.ArgumentParser(prog="python -m benches.study", description=__doc__)
    command.add_argument(
        "--out", type=Path, default=Path("benches/out"), help="folder of the report (default: %(default)s)"
    )
    command.add_argument(
        "--budget-seconds", type=float, default=BUDGET_SECONDS, help="time of the default study (default: %(default)s)"
    )
    command.add_argument(
        "--full", action="store_true", help="measure everything; goes on where an interrupted study stopped"
    )
    command.add_argument("--fresh", action="store_true", help="with --full: start over")
    command.add_argument("--threads", type=int, help="threads (default: PyTorch's)")
    command.add_argument(
        "--layout", choices=("nchw", "channels_last", "both"), help="memory format of inputs and results"
    )
    command.add_argument("--batch", type=numbers(int, BATCHES), help="batch sizes, such as 1,8")
    command.add_argument("--density", type=numbers(float, DENSITIES), help="densities, such as 0.5,0.25")
    command.add_argument("--lists", choices=("in", "both", "all"), help="in-lists only, both lists, or either")
    command.add_argument(
        "--only", type=re.compile, default=re.compile(""), metavar="REGEX", help="cells whose id matches"
    )
    command.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    command.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    command.add_argument(
        "--networks",
        type=lambda text: text.split(","),
        help=f"whole networks, of {','.join(NETWORKS)} (default: {','.join(FEW)}; with --full: all)",
    )
    command.add_argument("--no-layers", action="store_true", help="whole networks only")
    command.add_argument(
        "--rounds", type=int, help=f"rounds of each network (default: {MIN_ROUNDS} or more; --full: {FULL_ROUNDS})"
    )
    command.add_argument(
        "--peaks",
        action="store_true",
        help="measure the most memory that networks take, each in a process of its own; compiled ones compile again",
    )
    command.add_argument("--peers", type=lambda text: text.split(","), help="peers, comma-separated (default: all)")
    return command


def peer_names(given: Sequence[str] | None, device: torch.device, dtype: torch.dtype, console: Console) -> list[str]:
    """Return the peers to time: as given, or PyTorch's and every backend that can run; the others' reasons are shown.

    Raises:
        ValueError: For a name that is no peer.
        NotImplementedError: For a named backend that cannot run.
        PackageMissingError: If the package is to be measured and cannot be imported.
    """
    known = (*PEERS, *ours.BACKENDS, *WHOLE)
    if given is None:
        reasons = {name: ours.why_not(name, device, dtype) for name in ours.DEFAULT_BACKENDS[device.type]}
        for name, reason in reasons.items():
            if reason:
                console.print(f"Not measured: {name} ({reason})", highlight=False)
        return [*PEERS, *(name for name, reason in reasons.items() if not reason), *WHOLE]
    if unknown := [name for name in given if name not in known]:
        raise ValueError(f"study: expected `--peers` to be of {', '.join(known)}, got {', '.join(unknown)}.")
    names = [name for name in known if name in given]
    for name in names:
        if name in ours.BACKENDS and (reason := ours.why_not(name, device, dtype)):
            raise NotImplementedError(f"study: expected `--peers` to be able to run here, got {name}: {reason}")
    return names


def layer_tasks(options: argparse.Namespace, bench: Bench, names: Sequence[str]) -> list[Task]:
    """Return the single convolutions that the options ask for."""
    if options.no_layers:
        return []
    narrowed = any(value is not None for value in (options.batch, options.density, options.layout, options.lists))
    if options.full or narrowed:
        cells = full_cells(
            options.batch or (BATCHES if options.full else (1,)),
            options.density or DENSITIES,
            (options.lists,) if options.lists in LISTS else LISTS,
            (options.layout,) if options.layout in LAYOUTS else LAYOUTS,
        )
    else:
        cells = default_cells()
    return [Task(cell.id, names, partial(bench.rows, cell, names)) for cell in cells if options.only.search(cell.id)]


def network_tasks(options: argparse.Namespace, names: Sequence[str]) -> list[Task]:
    """Return the whole networks that the options ask for."""
    if options.lists == "both":
        return []
    networks = options.networks or (NETWORKS if options.full else FEW)
    if unknown := [name for name in networks if name not in NETWORKS]:
        raise ValueError(f"study: expected `--networks` to be of {', '.join(NETWORKS)}, got {', '.join(unknown)}.")
    if options.rounds is not None and options.rounds < 1:
        raise ValueError(f"study: expected `--rounds` to be positive, got {options.rounds}.")
    default_layouts = LAYOUTS if options.full or options.layout == "both" else ("channels_last",)
    layouts = (options.layout,) if options.layout in LAYOUTS else default_layouts
    wanted = {"dense", "masked", "planned", "pruned", *(ours.BACKENDS if options.full else ("native", "auto"))}
    # Compiling takes longer than all that the default study measures; to name it is to ask for it.
    wanted.update(name for name in COMPILED if options.full or name in (options.peers or ()))
    compared = [name for name in names if name in wanted]
    rounds = options.rounds or (FULL_ROUNDS if options.full else MIN_ROUNDS)
    peaks = network_peaks if options.peaks and options.device == "cpu" else None
    bench = NetworkBench(torch.device(options.device), options.dtype, rounds, peaks)
    cells = network_cells(options.batch or BATCHES, options.density or DENSITIES, layouts, list(networks))
    if options.full:
        # One compiled dense network serves all densities.
        cells.sort(key=lambda cell: (cell.layout, cell.batch, cell.network))
    return [
        Task(cell.id, compared, partial(bench.rows, cell, compared), cell.network, cell.batch)
        for cell in cells
        if compared and options.only.search(cell.id)
    ]


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


def study(options: argparse.Namespace, console: Console) -> None:
    """Measure, then write and show the report."""
    start = time.perf_counter()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    names = peer_names(options.peers, device, DTYPES[options.dtype], console)
    build, isa = {}, "none"
    if with_ours := any(name in ours.BACKENDS or name in WHOLE for name in names):
        ours.fresh_choices()
        build, isa = dict(ours.library().build_facts()), ours.library().isa()
    console.print(f"Measuring the machine's peaks with {torch.get_num_threads()} threads ...")
    roof = measure_roof(DTYPES[options.dtype], device)
    header = describe(device, options.dtype, roof, build, isa)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "rows.jsonl"
    if options.fresh or not options.full:
        path.unlink(missing_ok=True)
    journal = Journal(path, header)

    of_layers = [name for name in names if name not in WHOLE]
    layers = layer_tasks(options, Bench(device, options.dtype, roof), of_layers) if of_layers else []
    networks = network_tasks(options, names)
    far = float("inf")
    end = far if options.full else start + options.budget_seconds - REPORT_SECONDS
    network_seconds = 0.0 if options.full or not networks else NETWORK_SHARE * (end - time.perf_counter())
    layer_seconds = FULL_LAYER_SECONDS if options.full else far
    with progress_bars(console) as progress:
        if options.full or (options.only.search(OVERHEAD) and not options.no_layers):
            journal.append(measure_overhead(device, options.dtype, OVERHEAD_PEERS if with_ours else ("conv2d",)))
        layers_done = run_tasks(
            layers, journal, progress, "layers", end - network_seconds, layer_seconds, options.dtype, device.type
        )
        networks_done = run_tasks(
            networks,
            journal,
            progress,
            "networks",
            end,
            FULL_NETWORK_SECONDS if options.full else 3.0,
            options.dtype,
            device.type,
        )
    header["coverage"] = (
        f"{layers_done} of {len(layers)} layer cases and {networks_done} of {len(networks)} network cases "
        f"in {time.perf_counter() - start:.0f} s"
    )
    for table in report.write(options.out, header, journal.rows):
        if table.screen:
            console.print(table.rich())
    console.print(f"Measured {header['coverage']}.")
    if layers_done < len(layers) or networks_done < len(networks):
        console.print("The time ran out; a larger --budget-seconds, or --full, measures the rest.")
    warn_if_busy(console, journal.rows)
    console.print(
        f"Report: {options.out / 'report.html'} (also report.md, results.json, results.csv, rows.jsonl, plots/)"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study; errors that a user can mend are one line."""
    console = wide_console()
    try:
        study(parser().parse_args(arguments), console)
    except (ours.PackageMissingError, NotImplementedError, ValueError) as error:
        console.print(f"[red]{error}[/]", highlight=False)
        return 1
    except KeyboardInterrupt:
        console.print("Interrupted; with --full, the same command goes on from here.")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
