"""The speed-up study: ``python -m benches.study --out DIR``.

By default it measures a selection of cells within ``--budget-seconds``; with ``--full`` it measures everything, and
continues an interrupted study.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial

import torch
from rich.console import Console

from benches import engines, ours, report
from benches.baselines import BASELINES
from benches.cases import BATCHES, DENSITIES, LAYOUTS, LISTS, default_cells, full_cells, has_out_lists
from benches.measure import DTYPES, Bench
from benches.network_models import DEFAULT_NETWORKS, NETWORKS, network_cells
from benches.networks import MIN_ROUNDS, OPT_IN, WHOLE, NetworkBench
from benches.overhead import VARIANTS as OVERHEAD_VARIANTS
from benches.overhead import measure_overhead
from benches.running import (
    Task,
    available_backends,
    begin,
    command_line,
    common_options,
    device_of,
    finish,
    numbers,
    progress_bars,
    run_tasks,
)
from benches.summary import OVERHEAD

BUDGET_SECONDS = 110.0
# Reserved for plots and files.
REPORT_SECONDS = 9.0
# Share of the budget for whole networks.
NETWORK_SHARE = 0.3
# Time per cell of a full study, which has no budget.
FULL_LAYER_SECONDS, FULL_NETWORK_SECONDS = 1.0, 6.0
# Rounds of whole networks in a full study: compiling takes up the seconds, and three rounds are too few.
FULL_ROUNDS = 10


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    command = argparse.ArgumentParser(prog="python -m benches.study", description=__doc__)
    common_options(command, "benches/out", BUDGET_SECONDS)
    command.add_argument("--full", action="store_true", help="measure everything; continues an interrupted study")
    command.add_argument("--layout", choices=("nchw", "channels_last", "both"), help="memory format")
    command.add_argument("--batch", type=numbers(int, BATCHES), help="batch sizes, such as 1,8")
    command.add_argument("--density", type=numbers(float, DENSITIES), help="densities, such as 0.5,0.25")
    command.add_argument("--lists", choices=(*LISTS, "all"), help="in-lists only or both, round or ragged")
    command.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    command.add_argument(
        "--networks",
        type=lambda text: text.split(","),
        help=f"whole networks, of {','.join(NETWORKS)} (default: {','.join(DEFAULT_NETWORKS)}; with --full: all)",
    )
    command.add_argument("--no-layers", action="store_true", help="whole networks only")
    command.add_argument(
        "--rounds", type=int, help=f"rounds of each network (default: {MIN_ROUNDS} or more; --full: {FULL_ROUNDS})"
    )
    command.add_argument(
        "--peaks",
        action="store_true",
        help="measure the peak memory of networks, each in a process of its own; compiled ones compile again",
    )
    command.add_argument(
        "--variants",
        "--peers",
        type=lambda text: ["gather_conv" if name == "best" else name for name in text.split(",")],
        help="variants, comma-separated (default: all)",
    )
    return command


def variant_names(
    requested: Sequence[str] | None,
    device: torch.device,
    dtype: torch.dtype,
    console: Console,
    engines_too: bool = False,
) -> list[str]:
    """Return the variants to time: those requested, or the baselines and every backend that can run here.

    Raises:
        ValueError: For a name that is no variant.
        NotImplementedError: For a requested backend that cannot run.
        PackageMissingError: If the package is to be measured and cannot be imported.
    """
    known = (*BASELINES, *ours.BACKENDS, *WHOLE)
    if requested is None:
        backends = available_backends(ours.DEFAULT_BACKENDS[device.type], device, dtype, console)
        return [*BASELINES, *backends, *_whole(device, dtype, console, engines_too)]
    if unknown := [name for name in requested if name not in known]:
        raise ValueError(f"study: expected `--variants` to be of {', '.join(known)}, got {', '.join(unknown)}.")
    names = [name for name in known if name in requested]
    for name in names:
        if name in ours.BACKENDS and (reason := ours.unsupported_reason(name, device, dtype)):
            raise NotImplementedError(f"study: expected `--variants` to be able to run here, got {name}: {reason}")
        if name in engines.ENGINES and (reason := engines.missing_reason(name, device.type, _name_of(dtype))):
            raise NotImplementedError(f"study: expected `--variants` to be able to run here, got {name}: {reason}")
    return names


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _whole(device: torch.device, dtype: torch.dtype, console: Console, engines_too: bool) -> list[str]:
    """Variants of whole networks; with the engines that can run here, naming those that cannot."""
    names = [name for name in WHOLE if name not in engines.ENGINES]
    for name in engines.ENGINES if engines_too else ():
        if reason := engines.missing_reason(name, device.type, _name_of(dtype)):
            console.print(f"{name} is left out: {reason}.", highlight=False)
        else:
            names.append(name)
    return names


def layer_tasks(options: argparse.Namespace, bench: Bench, names: Sequence[str]) -> list[Task]:
    """Return the single convolutions that the options select."""
    if options.no_layers:
        return []
    selected = any(value is not None for value in (options.batch, options.density, options.layout, options.lists))
    if options.full or selected:
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
    """Return the whole networks that the options select."""
    lists = options.lists or ("all" if options.full else "in")
    kinds = [kind for kind in LISTS if not has_out_lists(kind) and lists in ("all", kind)]
    if not kinds:
        return []
    networks = options.networks or (NETWORKS if options.full else DEFAULT_NETWORKS)
    if unknown := [name for name in networks if name not in NETWORKS]:
        raise ValueError(f"study: expected `--networks` to be of {', '.join(NETWORKS)}, got {', '.join(unknown)}.")
    if options.rounds is not None and options.rounds < 1:
        raise ValueError(f"study: expected `--rounds` to be positive, got {options.rounds}.")
    default_layouts = LAYOUTS if options.full or options.layout == "both" else ("channels_last",)
    layouts = (options.layout,) if options.layout in LAYOUTS else default_layouts
    selection = {"dense", "masked", "planned", "pruned", *(ours.BACKENDS if options.full else ("native", "auto"))}
    # Compiling takes longer than the default study.
    selection.update(name for name in OPT_IN if options.full or name in (options.variants or ()))
    compared = [name for name in names if name in selection]
    rounds = options.rounds or (FULL_ROUNDS if options.full else MIN_ROUNDS)
    peaks = options.peaks and options.device == "cpu"
    bench = NetworkBench(torch.device(options.device), options.dtype, rounds, peaks)
    cells = network_cells(options.batch or BATCHES, options.density or DENSITIES, layouts, list(networks), kinds)
    if options.full:
        # One compiled dense network serves all densities.
        cells.sort(key=lambda cell: (cell.layout, cell.batch, cell.network))
    return [
        Task(cell.id, compared, partial(bench.rows, cell, compared), cell.network, cell.batch)
        for cell in cells
        if compared and options.only.search(cell.id)
    ]


def study(options: argparse.Namespace, console: Console) -> None:
    """Measure, then write and print the report."""
    start = time.perf_counter()
    device = device_of(options.device)
    names = variant_names(options.variants, device, DTYPES[options.dtype], console, options.full)
    with_package = any(name in ours.BACKENDS or name in WHOLE for name in names)
    if with_package:
        ours.reset_choices()
    fresh = options.fresh or not options.full
    header, roofline, journal = begin(options, console, device, options.dtype, fresh, with_package)

    layer_variants = [name for name in names if name not in WHOLE]
    bench = Bench(device, options.dtype, roofline)
    layers = layer_tasks(options, bench, layer_variants) if layer_variants else []
    networks = network_tasks(options, names)
    unlimited = float("inf")
    end = unlimited if options.full else start + options.budget_seconds - REPORT_SECONDS
    network_seconds = 0.0 if options.full or not networks else NETWORK_SHARE * (end - time.perf_counter())
    layer_seconds = FULL_LAYER_SECONDS if options.full else unlimited
    with progress_bars(console) as progress:
        if options.full or (options.only.search(OVERHEAD) and not options.no_layers):
            journal.append(measure_overhead(device, options.dtype, OVERHEAD_VARIANTS if with_package else ("conv2d",)))
        layers_done = run_tasks(
            layers, journal, progress, "layers", end - network_seconds, layer_seconds, options.dtype, device.type
        )
        per_network = FULL_NETWORK_SECONDS if options.full else 3.0
        networks_done = run_tasks(networks, journal, progress, "networks", end, per_network, options.dtype, device.type)
    header["coverage"] = (
        f"{layers_done} of {len(layers)} layer cases and {networks_done} of {len(networks)} network cases "
        f"in {time.perf_counter() - start:.0f} s"
    )
    finish(options.out, console, report.write(options.out, header, journal.rows), journal.rows)
    console.print(f"Measured {header['coverage']}.")
    if layers_done < len(layers) or networks_done < len(networks):
        console.print("The time ran out; a larger --budget-seconds, or --full, measures the rest.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    return command_line(study, parser(), arguments, "; with --full, the same command continues")


if __name__ == "__main__":
    sys.exit(main())
