"""A study whose runs are tasks of Ray, on one or several machines that share the study's folder.

The tasks fill the folder; the table is then made by :func:`bap.results.study.study`, which finds every run finished.
Ray starts a task again where its machine or process ended, and the run goes on from its last epoch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bap.config import Config
from bap.results.grid import Cell, StudyGrid
from bap.results.run import is_finished
from bap.results.study import (
    check_study,
    checked_domains,
    compared_rows,
    comparison,
    finetuned,
    prepared,
    row_of,
    run_cell,
    study,
)
from bap.train.finite import TrainError
from bap.train.lock import LockedError, folder_lock

__all__ = ["RayOptions", "StudyError", "study_on_ray"]

# How long a task waits for a run that was lost with its machine to let go of the folder.
_LOCK_SECONDS = 60.0


class StudyError(TrainError):
    """Runs of a study failed."""


@dataclass(frozen=True)
class RayOptions:
    """Where the tasks run and what each needs.

    Args:
        address: of a cluster, such as ``auto`` or ``10.0.0.1:6379``; None: a cluster of this machine alone, for this
            study.
        cpus, gpus: of each task; parts of a GPU are allowed. torch has one thread for each CPU, unless ``run.threads``
            says otherwise.
        retries: how often a task is started again after its process or machine ended.
    """

    address: str | None = None
    cpus: float = 1.0
    gpus: float = 0.0
    retries: int = 3

    def __post_init__(self) -> None:
        for name, least in (("cpus", 0), ("gpus", 0), ("retries", -1)):
            value = getattr(self, name)
            if not value >= least:
                raise ValueError(f"study_on_ray(): expected `{name}` to be at least {least}, got {value}.")
        if self.gpus > 1 and self.gpus != int(self.gpus):
            raise ValueError(f"study_on_ray(): expected `gpus` to be whole or at most 1, got {self.gpus}.")


@dataclass(frozen=True)
class _Study:
    """What all tasks know."""

    config: Config
    folder: Path
    directory: str
    grid: StudyGrid
    progress: bool


@dataclass(frozen=True)
class _Step:
    """One task: a run, or the baselines of ``compare`` of one seed."""

    kind: str
    seed: int
    domain: str = ""
    cell: Cell | None = None

    @property
    def name(self) -> str:
        """That of the run's folder or file."""
        if self.cell is not None:
            return self.cell.name
        return "_".join([part for part in (self.kind, self.domain, f"seed{self.seed}") if part])


def _run(plan: _Study, step: _Step) -> list[str]:
    """Runs a step where it is missing; returns lines about runs that were finished."""
    domains = checked_domains(plan.config)
    # A whole network for each domain is a step of its own, which the backbone does not wait for.
    grid = replace(plan.grid, baseline=False) if step.kind in ("backbone", "finetune") else plan.grid
    base, reference = prepared(plan.config, grid, step.seed, domains, plan.folder, plan.progress)
    said: list[str] = []
    if step.kind == "finetune":
        finetuned(base, step.domain, domains[step.domain], plan.folder, plan.progress)
        return said
    runs = comparison(base, domains, plan.folder, reference, said.append, plan.progress)
    if step.kind == "dense":
        runs.dense()
    if step.cell is not None:
        run_cell(runs, grid, step.cell, reference, said.append, plan.progress)
    if step.kind == "compare":
        rows = [row_of(plan.folder, cell, reference) for cell in grid.cells(step.seed)]
        compared_rows(runs, rows, grid, said.append, plan.progress)
    return said


def _task(plan: _Study, step: _Step, *before: object) -> list[str]:
    """A step as a task of Ray; ``before`` are the results of those that it needs."""
    # Paths in the settings are relative to where the study was started.
    if os.path.isdir(plan.directory):
        os.chdir(plan.directory)
    give_up = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            return _run(plan, step)
        except LockedError:
            if time.monotonic() > give_up:
                raise
            time.sleep(1.0)


# Steps, each with those that have to be finished before it.
_Steps = dict[_Step, list[_Step]]


def _steps(plan: _Study, domains: Sequence[str]) -> Iterator[tuple[_Step, list[_Step]]]:
    """The steps, each with those that have to be finished before it."""
    for seed in plan.grid.seeds:
        backbone = _Step("backbone", seed)
        yield backbone, []
        first = [backbone]
        if plan.grid.baseline:
            alone = [_Step("finetune", seed, domain=name) for name in domains]
            yield from ((step, [backbone]) for step in alone)
            first = alone
        if plan.grid.needs_dense(plan.config):
            dense = _Step("dense", seed)
            yield dense, first
            first = [dense]
        cells = [_Step("cell", seed, cell=cell) for cell in plan.grid.cells(seed)]
        yield from ((cell, first) for cell in cells)
        if plan.grid.compare:
            yield _Step("compare", seed), cells


def _cell_is_finished(plan: _Study, step: _Step) -> bool:
    """Whether a cell's results are there, which then needs no task."""
    if step.cell is None:
        return False
    return is_finished(plan.folder / step.name, plan.grid.settings(plan.config, step.cell))


def _check_machines(ray: Any, options: RayOptions, say: Callable[[str], None]) -> None:
    """A task that no machine can take would wait for ever: on a cluster, which may grow, that is said."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(each.get("CPU", 0) >= options.cpus and each.get("GPU", 0) >= options.gpus for each in alive):
        return
    have = ", ".join(f"{each.get('CPU', 0):g} CPUs and {each.get('GPU', 0):g} GPUs" for each in alive)
    if options.address is None:
        raise ValueError(
            f"study_on_ray(): expected a machine with {options.cpus:g} CPUs and {options.gpus:g} GPUs, got {have}."
        )
    say(f"no machine has {options.cpus:g} CPUs and {options.gpus:g} GPUs now ({have}): tasks wait for one")


def _start(ray: Any, plan: _Study, options: RayOptions, steps: _Steps) -> dict[_Step, Any]:
    task = ray.remote(
        num_cpus=options.cpus, num_gpus=options.gpus, max_retries=options.retries, retry_exceptions=False
    )(_task)
    tasks: dict[_Step, Any] = {}
    for step, before in steps.items():
        needs = [tasks[each] for each in before if each in tasks]
        if not _cell_is_finished(plan, step):
            tasks[step] = task.options(name=step.name).remote(plan, step, *needs)
    return tasks


def _collect(ray: Any, tasks: dict[_Step, Any], steps: _Steps, say: Callable[[str], None]) -> dict[_Step, str]:
    """Waits for all tasks, tells of those that are done; returns the errors of those that failed."""
    of_task = {task: step for step, task in tasks.items()}
    failed: dict[_Step, str] = {}
    waiting = list(of_task)
    while waiting:
        (done,), waiting = ray.wait(waiting, num_returns=1)
        step, error = of_task[done], ""
        try:
            for line in ray.get(done):
                say(line)
        except ray.exceptions.RayTaskError as problem:
            error = f"{type(problem.cause).__name__}: {problem.cause}"
        except ray.exceptions.RayError as problem:
            error = f"{type(problem).__name__}: {str(problem).strip().splitlines()[0]}"
        if error:
            # A task without its inputs fails with their error.
            missing = [each.name for each in steps[step] if each in failed]
            failed[step] = f"not run, for want of {', '.join(missing)}" if missing else error
            say(f"{step.name}: {failed[step]}")
    return failed


def study_on_ray(
    config: Config,
    folder: str | Path,
    grid: StudyGrid | None = None,
    say: Callable[[str], None] = print,
    progress: bool = False,
    options: RayOptions | None = None,
) -> Path:
    """As :func:`bap.results.study.study`, with a task of Ray for each backbone, baseline and cell.

    Every machine has to see the study's folder and the data under the same paths, and to have this version of ``bap``.
    What is on disk is not run again. A run that fails does not stop the others.

    Args:
        config, folder, grid, say, progress: as there.
        options: where the tasks run and what each needs.

    Returns:
        The path of study.md.

    Raises:
        ValueError: as there, and for options that cannot be used.
        FileError: as there.
        ImportError: if Ray is not installed.
        StudyError: if runs failed, after all others have ended; it names them.
    """
    options, grid = options or RayOptions(), grid or StudyGrid()
    try:
        import ray
    except ImportError as error:
        raise ImportError(
            "study_on_ray(): expected Ray to be installed. Hint: pip install 'bap_kernels[serve]'"
        ) from error
    check_study(config, grid)
    if options.gpus == 0 and config.run.device.startswith("cuda"):
        raise ValueError(
            f"study_on_ray(): expected tasks with GPUs for `run.device` {config.run.device!r}, got gpus=0. "
            "Hint: --ray-gpus 1"
        )
    plan = _Study(config, Path(folder).resolve(), os.getcwd(), grid, progress)
    with folder_lock(folder):
        domains = list(checked_domains(config))
        steps = dict(_steps(plan, domains))
        mine = not ray.is_initialized()
        if mine:
            # Without an address Ray would join a cluster that runs here.
            ray.init(address=options.address or "local", include_dashboard=None if options.address else False)
        try:
            _check_machines(ray, options, say)
            failed = _collect(ray, _start(ray, plan, options, steps), steps, say)
        finally:
            if mine:
                ray.shutdown()
        if failed:
            listed = "; ".join(f"{step.name} ({error})" for step, error in failed.items())
            raise StudyError(f"study_on_ray(): expected all runs to finish, got {len(failed)} that failed: {listed}")
        return study(config, folder, grid, say, progress)
