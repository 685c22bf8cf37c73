"""The command ``bap study``."""

from __future__ import annotations

from typing import Annotated

import typer

from bap.cli.options import Config, Out, Progress, Set

__all__ = ["study"]


def _variants(texts: list[str]) -> dict[str, list[str]]:
    variants: dict[str, list[str]] = {}
    for text in texts:
        name, colon, override = text.partition(":")
        if not colon:
            raise ValueError(f"study(): expected --variant NAME:KEY=VALUE, got {text!r}.")
        variants.setdefault(name, []).append(override)
    return variants


def study(
    out: Out,
    config: Config = None,
    set_: Set = None,
    beta: Annotated[list[float] | None, typer.Option(help="Budgets; 1, .75, .5 and .25 if none is given.")] = None,
    sharing: Annotated[
        list[str] | None, typer.Option(help="none, int, union, jaccard; all four if none is given.")
    ] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seeds; 0, 1 and 2 if none is given.")] = None,
    baseline: Annotated[bool, typer.Option(help="Also train a whole network for each domain, which S needs.")] = True,
    compare: Annotated[
        list[str] | None,
        typer.Option(
            help="A baseline beside the cells of the first sharing loss: dense, narrow, narrow-taught, shared-mask, "
            "domain-masks, magnitude or alone; may be given several times."
        ),
    ] = None,
    match: Annotated[
        list[str] | None, typer.Option(help="What baselines are matched on: flop, exact_flop; both if none is given.")
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(
            help="The method with another setting, NAME:KEY=VALUE, beside the same cells; several of one name add up."
        ),
    ] = None,
    ray: Annotated[bool, typer.Option("--ray", help="Run backbones, baselines and cells as tasks of Ray.")] = False,
    ray_address: Annotated[
        str | None, typer.Option(help="Cluster, such as auto or 10.0.0.1:6379; none: this machine alone.")
    ] = None,
    ray_cpus: Annotated[float, typer.Option(help="CPUs of each task.")] = 1.0,
    ray_gpus: Annotated[float, typer.Option(help="GPUs of each task; parts of one are allowed.")] = 0.0,
    ray_retries: Annotated[int, typer.Option(help="Restarts of a task whose machine or process ended.")] = 3,
    progress: Progress = True,
) -> None:
    """Train over budgets, sharing losses and seeds, and tabulate; resumes where it was stopped."""
    from functools import partial

    from bap.config import load_config
    from bap.results.study import StudyGrid
    from bap.results.study import study as run

    settings = load_config(config, set_ or [])
    if ray:
        from bap.results.study_on_ray import RayOptions, study_on_ray

        run = partial(study_on_ray, options=RayOptions(ray_address, ray_cpus, ray_gpus, ray_retries))
    elif (ray_address, ray_cpus, ray_gpus, ray_retries) != (None, 1.0, 0.0, 3):
        raise ValueError("study(): expected --ray beside --ray-address, --ray-cpus, --ray-gpus and --ray-retries.")
    losses = [None if loss == "none" else loss for loss in sharing] if sharing else StudyGrid.sharings
    grid = StudyGrid(
        beta or StudyGrid.betas,
        losses,
        seed or StudyGrid.seeds,
        baseline,
        compare or (),
        match or StudyGrid.match,
        _variants(variant or []),
    )
    path = run(settings, out, grid, lambda line: typer.echo(line, err=True), progress)
    typer.echo(path.read_text())
