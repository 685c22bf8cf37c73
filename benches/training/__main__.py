"""The study of training: ``python -m benches.training --out DIR``.

Without ``--layers``, ``--steps``, ``--parts`` or ``--curve`` it measures all of them, on a GPU the first two. It ends
when its budget is spent; the same command then continues.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial

import torch
from rich.console import Console

from benches import ours
from benches.cases import DENSITIES, LAYOUTS
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
from benches.training import curve, layers, parts, report, steps
from benches.training.bench import OPT_IN
from benches.training.cells import MODES, layer_cells, step_cells

BUDGET_SECONDS = 600.0
LAYER_SECONDS, STEP_SECONDS = 1.0, 8.0
KINDS = ("layers", "steps", "parts", "curve")
# Share of the budget for single layers if whole steps are measured too.
LAYER_SHARE = 0.6


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    command = argparse.ArgumentParser(prog="python -m benches.training", description=__doc__)
    common_options(command, "benches/out/training", BUDGET_SECONDS)
    command.add_argument("--layers", action="store_true", help="forward and backward of single convolutions")
    command.add_argument("--steps", action="store_true", help="whole training steps")
    command.add_argument("--parts", action="store_true", help="profile of a step, and the bound of its speed-up")
    command.add_argument("--curve", action="store_true", help="loss curves of a small network")
    command.add_argument(
        "--density", type=numbers(float, DENSITIES), default=list(DENSITIES), help="densities, such as 0.5,0.25"
    )
    command.add_argument(
        "--layout", choices=(*LAYOUTS, "both"), default="both", help="memory format (default: %(default)s)"
    )
    command.add_argument(
        "--mode", choices=(*MODES, "both"), default="both", help="whether weights are trained (default: %(default)s)"
    )
    command.add_argument("--batch", type=int, help="batch size (default: 8 for ResNet-50, 32 for ResNet-26)")
    command.add_argument("--no-peaks", action="store_true", help="skip peak memory, which is slow to measure")
    return command


def settings_of(options: argparse.Namespace) -> tuple[Sequence[str], list[float], Sequence[str], int | None]:
    """Return layouts, densities, modes and batch of the options."""
    layouts = LAYOUTS if options.layout == "both" else (options.layout,)
    modes = MODES if options.mode == "both" else (options.mode,)
    return layouts, options.density, modes, options.batch


def choose_kinds(options: argparse.Namespace) -> None:
    """Select all kinds that the device supports if none is selected.

    Raises:
        ValueError: If a selected kind is not supported.
    """
    supported = KINDS if options.device == "cpu" else KINDS[:2]
    if unsupported := [kind for kind in KINDS if getattr(options, kind) and kind not in supported]:
        raise ValueError(
            f"training: expected `--device cuda` with --layers and --steps alone, got --{unsupported[0]}. "
            f"Hint: --{unsupported[0]} is measured on the CPU."
        )
    if not any(getattr(options, kind) for kind in KINDS):
        vars(options).update(dict.fromkeys(supported, True))


def tasks_of(
    options: argparse.Namespace,
    layer_bench: layers.LayerBench,
    step_bench: steps.StepBench,
    backends: Sequence[str] = (),
) -> tuple[list[Task], list[Task]]:
    """Return the tasks of single layers and of steps; ``backends`` are additional variants."""
    settings = settings_of(options)
    layer_variants, step_variants = (*layers.VARIANTS, *backends), (*steps.VARIANTS, *backends)
    single = [
        Task(cell.id, layer_variants, partial(layer_bench.rows, cell, layer_variants))
        for cell in layer_cells(*settings)
        if options.layers and options.only.search(cell.id)
    ]
    whole = [
        Task(cell.id, step_variants, partial(step_bench.rows, cell, step_variants), "resnet26", cell.batch)
        for cell in step_cells(*settings)
        if options.steps and options.only.search(cell.id)
    ]
    return single, whole


def study(options: argparse.Namespace, console: Console) -> None:
    """Measure, then write and print the report."""
    start = time.perf_counter()
    choose_kinds(options)
    device = device_of(options.device)
    ours.package().use_backend("auto")
    header, _, journal = begin(options, console, device, "float32", options.fresh)
    if options.fresh:
        for name in ("curve.json", "parts.json"):
            (options.out / name).unlink(missing_ok=True)
    bench = layers.LayerBench(not options.no_peaks, device)
    step_bench = steps.StepBench(not options.no_peaks, device)
    single, whole = tasks_of(
        options, bench, step_bench, available_backends(OPT_IN[device.type], device, torch.float32, console)
    )
    profiled = [cell for cell in step_cells(*settings_of(options)) if options.parts and options.only.search(cell.id)]
    curves = curve.read(options.out)
    end = start + options.budget_seconds
    with progress_bars(console) as progress:
        if options.curve and {c.variant for c in curves} != set(curve.VARIANTS):
            bar = progress.add_task("curve", total=curve.STEPS * len(curve.VARIANTS) * len(curve.DTYPES), cell="")
            curves = [
                curve.train(variant, dtype, tick=lambda: progress.advance(bar))
                for dtype in curve.DTYPES
                for variant in curve.VARIANTS
            ]
            curve.write(options.out, curves)
        now = time.perf_counter()
        middle = now + (end - now) * (LAYER_SHARE if whole else 1.0)
        try:
            done = run_tasks(single, journal, progress, "layers", middle, LAYER_SECONDS, "float32", device.type)
        finally:
            bench.close()
        done += run_tasks(whole, journal, progress, "steps", end, STEP_SECONDS, "float32", device.type)
        bar = progress.add_task("parts", total=len(profiled), cell="")
        in_time, tick = (lambda: time.perf_counter() < end), (lambda: progress.advance(bar))
        profiles = parts.measure_all(step_bench, profiled, options.out, in_time, tick)
    for reason in (skipped := [*bench.skipped, *step_bench.skipped]):
        console.print(f"Skipped: {reason}", highlight=False)
    done += len({profile.cell for profile in profiles} & {cell.id for cell in profiled})
    total = len(single) + len(whole) + len(profiled)
    header["coverage"] = f"{done} of {total} cases in {time.perf_counter() - start:.0f} s" + "".join(
        f"; skipped: {reason}" for reason in skipped
    )
    finish(options.out, console, report.write(options.out, header, journal.rows, curves, profiles), journal.rows)
    if done < total:
        console.print(f"The time ran out after {done} of {total} cases; the same command continues.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    return command_line(study, parser(), arguments, "; the same command continues")


if __name__ == "__main__":
    sys.exit(main())
