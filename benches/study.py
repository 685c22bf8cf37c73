"""The speed-up study: ``python -m benches.study --out DIR``.

Without ``--full`` it measures the embedded default within ``--budget-seconds``; with it, everything, and a study that
was interrupted goes on where it stopped.
"""

import argparse
import re
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from benches import ours, report
from benches.baselines import BASELINES
from benches.cases import BATCHES, DENSITIES, LAYOUTS, LISTS, default_cells, full_cells
from benches.measure import DTYPES, Bench
from benches.network_memory import network_peaks
from benches.networks import FEW, MIN_ROUNDS, NAMED, NETWORKS, WHOLE, NetworkBench, network_cells
from benches.overhead import BASELINES as OVERHEAD_VARIANTS
from benches.overhead import measure_overhead
from benches.running import Task, begin, command_line, finish, numbers, progress_bars, run_tasks
from benches.summary import OVERHEAD

BUDGET_SECONDS = 110.0
# Kept free for plots and files.
REPORT_SECONDS = 9.0
# Share of the budget that whole networks get.
NETWORK_SHARE = 0.3
# Time for one cell of a full study, which has no budget.
FULL_LAYER_SECONDS, FULL_NETWORK_SECONDS = 1.0, 6.0
# Of whole networks in a full study; compiling takes its seconds, and three rounds are too few for a report.
FULL_ROUNDS = 10


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
    command.add_argument(
        "--variants", "--peers", type=lambda text: text.split(","), help="variants, comma-separated (default: all)"
    )
    return command


def variant_names(given: Sequence[str] | None, device: torch.device, dtype: torch.dtype, console: Console) -> list[str]:
    """Return the variants to time: as given, or PyTorch's and every backend that can run here.

    For backends that cannot run the reason is shown.

    Raises:
        ValueError: For a name that is no variant.
        NotImplementedError: For a named backend that cannot run.
        PackageMissingError: If the package is to be measured and cannot be imported.
    """
    known = (*BASELINES, *ours.BACKENDS, *WHOLE)
    if given is None:
        reasons = {name: ours.why_not(name, device, dtype) for name in ours.DEFAULT_BACKENDS[device.type]}
        for name, reason in reasons.items():
            if reason:
                console.print(f"Not measured: {name} ({reason})", highlight=False)
        return [*BASELINES, *(name for name, reason in reasons.items() if not reason), *WHOLE]
    if unknown := [name for name in given if name not in known]:
        raise ValueError(f"study: expected `--variants` to be of {', '.join(known)}, got {', '.join(unknown)}.")
    names = [name for name in known if name in given]
    for name in names:
        if name in ours.BACKENDS and (reason := ours.why_not(name, device, dtype)):
            raise NotImplementedError(f"study: expected `--variants` to be able to run here, got {name}: {reason}")
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
    wanted.update(name for name in NAMED if options.full or name in (options.variants or ()))
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


def study(options: argparse.Namespace, console: Console) -> None:
    """Measure, then write and show the report."""
    start = time.perf_counter()
    device = torch.device(options.device)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    names = variant_names(options.variants, device, DTYPES[options.dtype], console)
    with_ours = any(name in ours.BACKENDS or name in WHOLE for name in names)
    if with_ours:
        ours.fresh_choices()
    fresh = options.fresh or not options.full
    header, roof, journal = begin(options, console, device, options.dtype, fresh, with_ours)

    of_layers = [name for name in names if name not in WHOLE]
    layers = layer_tasks(options, Bench(device, options.dtype, roof), of_layers) if of_layers else []
    networks = network_tasks(options, names)
    far = float("inf")
    end = far if options.full else start + options.budget_seconds - REPORT_SECONDS
    network_seconds = 0.0 if options.full or not networks else NETWORK_SHARE * (end - time.perf_counter())
    layer_seconds = FULL_LAYER_SECONDS if options.full else far
    with progress_bars(console) as progress:
        if options.full or (options.only.search(OVERHEAD) and not options.no_layers):
            journal.append(measure_overhead(device, options.dtype, OVERHEAD_VARIANTS if with_ours else ("conv2d",)))
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
    finish(options.out, console, report.write(options.out, header, journal.rows), journal.rows)
    console.print(f"Measured {header['coverage']}.")
    if layers_done < len(layers) or networks_done < len(networks):
        console.print("The time ran out; a larger --budget-seconds, or --full, measures the rest.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study; errors that a user can mend are one line."""
    return command_line(study, parser(), arguments, "; with --full, the same command goes on from here")


if __name__ == "__main__":
    sys.exit(main())
