"""The study of training: ``python -m benches.training --out DIR``.

Without ``--layers``, ``--steps``, ``--parts`` or ``--curve`` it does all of them, on a GPU the first two. It ends when
its budget is spent; the same command then goes on where it stopped.
"""

import argparse
import re
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from benches import ours
from benches.cases import DENSITIES, LAYOUTS
from benches.running import Task, begin, command_line, finish, numbers, progress_bars, run_tasks
from benches.training import curve, layers, parts, report, steps
from benches.training.backends import device_of, named_backends
from benches.training.cells import MODES, layer_cells, step_cells

BUDGET_SECONDS = 600.0
LAYER_SECONDS, STEP_SECONDS = 1.0, 8.0
KINDS = ("layers", "steps", "parts", "curve")
# Share of the budget that single layers get where whole steps are measured too.
LAYER_SHARE = 0.6


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    command = argparse.ArgumentParser(prog="python -m benches.training", description=__doc__)
    command.add_argument(
        "--out", type=Path, default=Path("benches/out/training"), help="folder of the report (default: %(default)s)"
    )
    command.add_argument("--layers", action="store_true", help="forward and backward of single convolutions")
    command.add_argument("--steps", action="store_true", help="whole steps of training")
    command.add_argument("--parts", action="store_true", help="where the time of a step goes, and what bounds it")
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
    command.add_argument(
        "--only", type=re.compile, default=re.compile(""), metavar="REGEX", help="cells whose id matches"
    )
    command.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    command.add_argument("--no-peaks", action="store_true", help="leave out peaks of memory, which take their time")
    command.add_argument(
        "--budget-seconds", type=float, default=BUDGET_SECONDS, help="time to spend (default: %(default)s)"
    )
    command.add_argument("--fresh", action="store_true", help="start over")
    command.add_argument("--threads", type=int, help="threads (default: PyTorch's)")
    return command


def settings_of(options: argparse.Namespace) -> tuple[Sequence[str], list[float], Sequence[str], int | None]:
    """Return layouts, densities, modes and batch that the options ask for."""
    layouts = LAYOUTS if options.layout == "both" else (options.layout,)
    modes = MODES if options.mode == "both" else (options.mode,)
    return layouts, options.density, modes, options.batch


def choose_kinds(options: argparse.Namespace) -> None:
    """Ask for all that the device has where nothing is asked for.

    Raises:
        ValueError: If what is asked for is of the CPU alone.
    """
    of_device = KINDS if options.device == "cpu" else KINDS[:2]
    if odd := [kind for kind in KINDS if getattr(options, kind) and kind not in of_device]:
        raise ValueError(
            f"training: expected `--device cuda` with --layers and --steps alone, got --{odd[0]}. "
            f"Hint: --{odd[0]} is measured on the CPU."
        )
    if not any(getattr(options, kind) for kind in KINDS):
        vars(options).update(dict.fromkeys(of_device, True))


def tasks_of(
    options: argparse.Namespace, layer_bench: layers.LayerBench, step_bench: steps.StepBench, named: Sequence[str] = ()
) -> tuple[list[Task], list[Task]]:
    """Return the single layers and the steps that the options ask for; ``named`` are further variants."""
    chosen = settings_of(options)
    of_layers, of_steps = (*layers.BASELINES, *named), (*steps.BASELINES, *named)
    single = [
        Task(cell.id, of_layers, partial(layer_bench.rows, cell, of_layers))
        for cell in layer_cells(*chosen)
        if options.layers and options.only.search(cell.id)
    ]
    whole = [
        Task(cell.id, of_steps, partial(step_bench.rows, cell, of_steps), "resnet26", cell.batch)
        for cell in step_cells(*chosen)
        if options.steps and options.only.search(cell.id)
    ]
    return single, whole


def study(options: argparse.Namespace, console: Console) -> None:
    """Measure, then write and show the report."""
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
    single, whole = tasks_of(options, bench, step_bench, named_backends(device, console))
    profiled = [cell for cell in step_cells(*settings_of(options)) if options.parts and options.only.search(cell.id)]
    curves = curve.read(options.out)
    end = start + options.budget_seconds
    with progress_bars(console) as progress:
        if options.curve and {one.variant for one in curves} != set(curve.BASELINES):
            bar = progress.add_task("curve", total=curve.STEPS * len(curve.BASELINES) * len(curve.DTYPES), what="")
            curves = [
                curve.train(variant, dtype, tick=lambda: progress.advance(bar))
                for dtype in curve.DTYPES
                for variant in curve.BASELINES
            ]
            curve.write(options.out, curves)
        now = time.perf_counter()
        middle = now + (end - now) * (LAYER_SHARE if whole else 1.0)
        try:
            done = run_tasks(single, journal, progress, "layers", middle, LAYER_SECONDS, "float32", device.type)
        finally:
            bench.close()
        done += run_tasks(whole, journal, progress, "steps", end, STEP_SECONDS, "float32", device.type)
        bar = progress.add_task("parts", total=len(profiled), what="")
        in_time, tick = (lambda: time.perf_counter() < end), (lambda: progress.advance(bar))
        known = parts.measure_all(step_bench, profiled, options.out, in_time, tick)
    for reason in (left_out := [*bench.left_out, *step_bench.left_out]):
        console.print(f"Left out: {reason}", highlight=False)
    done += len({one.cell for one in known} & {cell.id for cell in profiled})
    wanted = len(single) + len(whole) + len(profiled)
    header["coverage"] = f"{done} of {wanted} cases in {time.perf_counter() - start:.0f} s" + "".join(
        f"; left out: {reason}" for reason in left_out
    )
    finish(options.out, console, report.write(options.out, header, journal.rows, curves, known), journal.rows)
    if done < wanted:
        console.print(f"The time ran out after {done} of {wanted} cases; the same command goes on from here.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study; errors that a user can mend are one line."""
    return command_line(study, parser(), arguments, "; the same command goes on from here")


if __name__ == "__main__":
    sys.exit(main())
