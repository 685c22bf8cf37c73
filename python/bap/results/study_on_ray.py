"""A study whose runs are tasks of Ray, on one or several machines that share the study's folder.

The tasks fill the folder; the table is then made by :func:`bap.results.study.study`, which finds every run finished.
Ray starts a task again where its machine or process ended, and the run goes on from its last epoch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bap.config import Config
from bap.data import Domain
from bap.results.compare import MATCHES
from bap.results.run import scored, train_run
from bap.results.study import (
    DENSE,
    cell_name,
    check_study,
    checked_domains,
    compared_rows,
    comparison,
    finetuned,
    is_finished,
    pretrained,
    said_of,
    study,
)
from bap.train.lock import LockedError, folder_lock
from bap.train.run_log import read_results
from bap.train.trainer import TrainError

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
    betas: tuple[float, ...]
    sharings: tuple[str | None, ...]
    baseline: bool
    compare: tuple[str, ...]
    match: tuple[str, ...]
    progress: bool

    @property
    def dense(self) -> bool:
        """Whether the cells learn from the dense network of their seed."""
        return self.config.distill.teacher == DENSE


@dataclass(frozen=True)
class _Step:
    """One task: a run, or the baselines of ``compare`` of one seed."""

    kind: str
    seed: int
    domain: str = ""
    beta: float = 1.0
    sharing: str | None = None

    @property
    def name(self) -> str:
        """That of the run's folder or file."""
        if self.kind == "cell":
            return cell_name(self.beta, self.sharing, self.seed)
        return "_".join([part for part in (self.kind, self.domain, f"seed{self.seed}") if part])


def _prepared(plan: _Study, step: _Step, domains: dict[str, Domain]) -> tuple[Config, dict[str, float]]:
    """Settings of a seed with its backbone, and its baseline; both are on disk, or are what the step is to train."""
    base = plan.config.replace(seed=step.seed)
    base = base.replace(weights=str(pretrained(base, domains, plan.folder, plan.progress)))
    if not plan.baseline or step.kind in ("backbone", "finetune"):
        return base, {}
    return base, {name: finetuned(base, name, each, plan.folder, plan.progress) for name, each in domains.items()}


def _run(plan: _Study, step: _Step) -> list[str]:
    """Runs a step where it is missing; returns lines about runs that were finished."""
    domains = checked_domains(plan.config)
    base, reference = _prepared(plan, step, domains)
    said: list[str] = []
    if step.kind == "finetune":
        finetuned(base, step.domain, domains[step.domain], plan.folder, plan.progress)
        return said
    runs = comparison(base, domains, plan.folder, reference, said.append, plan.progress)
    if step.kind == "dense":
        runs.dense()
        return said
    if plan.dense:
        base = base.replace(teacher=str(plan.folder / f"dense_seed{step.seed}" / "checkpoint"))
    if step.kind == "cell":
        path, one = plan.folder / step.name, base.replace(beta=step.beta, sharing=step.sharing)
        if not is_finished(path, one):
            done = train_run(one, path, resume=True, baseline=reference, domains=domains, progress=plan.progress)
            said.append(said_of(step.name, done))
    if step.kind == "compare":
        names = [cell_name(beta, sharing, step.seed) for beta in plan.betas for sharing in plan.sharings]
        results = [read_results(plan.folder / name) for name in names]
        rows = [{"seed": step.seed, **each, **scored(each, reference)} for each in results]
        compared_rows(runs, rows, plan.compare, plan.match, said.append, plan.progress)
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


def _steps(plan: _Study, seeds: Sequence[int], domains: Sequence[str]) -> Iterator[tuple[_Step, list[_Step]]]:
    """The steps, each with those that have to be finished before it."""
    for seed in seeds:
        backbone = _Step("backbone", seed)
        yield backbone, []
        first = [backbone]
        if plan.baseline:
            alone = [_Step("finetune", seed, domain=name) for name in domains]
            yield from ((step, [backbone]) for step in alone)
            first = alone
        if plan.dense:
            dense = _Step("dense", seed)
            yield dense, first
            first = [dense]
        cells = [_Step("cell", seed, beta=beta, sharing=sharing) for beta in plan.betas for sharing in plan.sharings]
        yield from ((cell, first) for cell in cells)
        if plan.compare:
            yield _Step("compare", seed), cells


def _cell_is_finished(plan: _Study, step: _Step) -> bool:
    """Whether a cell's results are there, which then needs no task."""
    if step.kind != "cell":
        return False
    one = plan.config.replace(seed=step.seed, beta=step.beta, sharing=step.sharing)
    return is_finished(plan.folder / step.name, one)


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
    betas: Sequence[float] = (1.0, 0.75, 0.5, 0.25),
    sharings: Sequence[str | None] = (None, "int", "union", "jaccard"),
    seeds: Sequence[int] = (0, 1, 2),
    baseline: bool = True,
    say: Callable[[str], None] = print,
    progress: bool = False,
    compare: Sequence[str] = (),
    match: Sequence[str] = MATCHES,
    options: RayOptions | None = None,
) -> Path:
    """As :func:`bap.results.study.study`, with a task of Ray for each backbone, baseline and cell.

    Every machine has to see the study's folder and the data under the same paths, and to have this version of ``bap``.
    What is on disk is not run again. A run that fails does not stop the others.

    Args:
        config, folder, betas, sharings, seeds, baseline, say, progress, compare, match: as there.
        options: where the tasks run and what each needs.

    Returns:
        The path of study.md.

    Raises:
        ValueError: as there, and for options that cannot be used.
        FileError: as there.
        ImportError: if Ray is not installed.
        StudyError: if runs failed, after all others have ended; it names them.
    """
    options = options or RayOptions()
    try:
        import ray
    except ImportError as error:
        raise ImportError(
            "study_on_ray(): expected Ray to be installed. Hint: pip install 'bap_kernels[serve]'"
        ) from error
    check_study(config, betas, sharings, seeds, compare, match)
    if options.gpus == 0 and config.run.device.startswith("cuda"):
        raise ValueError(
            f"study_on_ray(): expected tasks with GPUs for `run.device` {config.run.device!r}, got gpus=0. "
            "Hint: --ray-gpus 1"
        )
    plan = _Study(
        *(config, Path(folder).resolve(), os.getcwd(), tuple(betas), tuple(sharings), baseline),
        *(tuple(compare), tuple(match), progress),
    )
    with folder_lock(folder):
        domains = list(checked_domains(config))
        steps = dict(_steps(plan, seeds, domains))
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
        return study(config, folder, betas, sharings, seeds, baseline, say, progress, compare, match)
