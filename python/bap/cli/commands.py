"""The commands of ``bap``. Results go to the standard output as JSON; progress goes to the error stream.

Training prints a line per epoch, in every ``log_every`` steps and after ``log_seconds`` without one, whether or not
there is a terminal; ``--no-progress`` turns that off. Under torchrun one process prints.
"""

from __future__ import annotations

import json
import os
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from bap.cli.options import Checkpoint, Config, Domains, Out, Progress, Resume, Root, Set
from bap.cli.serving import serve
from bap.cli.studying import study

app = typer.Typer(
    name="bap",
    help="Budget-aware pruning of multi-domain networks: train, prune, evaluate, report.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


# Commands that run under torchrun.
_PARALLEL = ("train", "pretrain")


class SplitName(str, Enum):
    """Splits that can be evaluated."""

    train = "train"
    val = "val"
    test = "test"


def _first() -> bool:
    """Whether this is the process that prints."""
    return os.environ.get("RANK", "0") == "0"


def _print(value: Any) -> None:
    if _first():
        typer.echo(json.dumps(value, indent=1))


@app.callback()
def _one_process(context: typer.Context) -> None:
    if os.environ.get("WORLD_SIZE", "1") != "1" and context.invoked_subcommand not in _PARALLEL:
        raise ValueError(
            f"bap {context.invoked_subcommand}: expected one process, got {os.environ['WORLD_SIZE']}. "
            "Hint: only `bap train` and `bap pretrain` run under torchrun."
        )


def _table(title: str, rows: list[dict[str, Any]]) -> None:
    """A table on the error stream, where that is a terminal."""
    if not sys.stderr.isatty() or not rows or not _first():
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name, justify="left" if isinstance(rows[0][name], str) else "right")
    for row in rows:
        table.add_row(*(f"{x:,.3f}" if isinstance(x, float) else f"{x:,}" if isinstance(x, int) else str(x)
                        for x in row.values()))  # fmt: skip
    Console(stderr=True).print(table)


@app.command()
def pretrain(
    out: Out, config: Config = None, set_: Set = None, resume: Resume = False, progress: Progress = True
) -> None:
    """Train the plain backbone on the source domain; writes backbone.safetensors. It may run under torchrun."""
    from bap.config import load_config
    from bap.train.domains import check_source, load_domains, source_of, suite_of
    from bap.train.pretrain import check_backbone, state_of
    from bap.train.pretrain import pretrain as run
    from bap.train.processes import Processes

    settings = load_config(config, set_ or [])
    processes = Processes(settings.run.device)
    # The source is needed here, also where the joint training leaves it out; the other domains are not.
    settings = settings.replace(source_mode="switched")
    names = settings.data.domains or suite_of(settings)
    check_source(settings, names)
    source = source_of(settings, names)
    path = out / "backbone.safetensors"
    with processes.lock(out):
        there = [file for file in (path, state_of(path)) if file.exists()]
        if there and not resume:
            raise ValueError(f"bap pretrain: expected {out} to have no backbone, got {there[0].name}. Hint: --resume")
        # What several processes find must not depend on which of them writes first.
        processes.wait()
        if path not in there:
            domains = load_domains(settings.replace(domains=[source]), ("train", settings.data.evaluate_on))
            run(settings, domains[source], path, progress, resume)
        info = check_backbone(path, settings, source)
    _print({"weights": str(path), "source": source, **info.get("records", [{}])[-1]})


@app.command()
def train(
    out: Out,
    config: Config = None,
    set_: Set = None,
    resume: Resume = False,
    baseline: Annotated[Path | None, typer.Option(help="JSON, {domain: accuracy in per cent}, for the scores.")] = None,
    callback: Annotated[
        list[str] | None,
        typer.Option(help="package.module:Class, a bap.results.callbacks.Callback that is told of every epoch."),
    ] = None,
    progress: Progress = True,
) -> None:
    """Train all domains jointly under a budget; under torchrun on several processes."""
    from bap.config import load_config
    from bap.results.callbacks import load_callback
    from bap.results.run import baseline_of, train_run

    settings = load_config(config, set_ or [])
    callbacks = [load_callback(name) for name in callback or ()]
    results = train_run(settings, out, resume, baseline_of(settings, baseline), progress=progress, callbacks=callbacks)
    rows = [
        {
            "domain": name,
            "accuracy": value,
            "kept": results["kept"][name],
            "projected": results["projected_off"].get(name, 0),
        }
        for name, value in results["accuracy"].items()
    ]
    _table(f"budget {results['beta']:g} of {results['measure']}", rows)
    _print(results)


def _loaded(
    checkpoint: Path, domains: list[str] | None, root: Path | None, split: str
) -> tuple[Any, Any, dict[str, Any]]:
    from bap.train.checkpoint import load_checkpoint
    from bap.train.domains import load_domains

    model, config, specs = load_checkpoint(checkpoint, domains or None)
    config = config.replace(domains=list(specs), source_mode="switched", root=str(root) if root else config.data.root)
    data = load_domains(config, ("train", split))
    for name, domain in data.items():
        if list(domain.classes) != specs[name]["classes"]:
            raise ValueError(
                f"bap eval: expected the data of {name!r} to have the classes that {checkpoint} was trained on, got "
                "others, or in another order."
            )
    return model, config, data


def _sizes_of(specs: dict[str, Any], checkpoint: Path) -> dict[str, int]:
    sizes = {name: spec.get("size") for name, spec in specs.items()}
    if None in sizes.values():
        raise ValueError(f"bap: expected the domains of {checkpoint} to have input sizes, got {sizes}.")
    return sizes


def _size_of(specs: dict[str, Any], checkpoint: Path) -> int:
    """The size of most domains; shares of the backbone are counted at it."""
    sizes = list(_sizes_of(specs, checkpoint).values())
    return max(sizes, key=sizes.count)


@app.command()
def prune(
    checkpoint: Checkpoint,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the pruned network.")] = None,
) -> None:
    """Drop what no domain uses; fails if an output of any domain changes by more than rounding."""
    import torch

    from bap.prune.prune import prune_
    from bap.train.checkpoint import domains_of, load_checkpoint, save_checkpoint
    from bap.train.lock import folder_lock

    model, config, specs = load_checkpoint(checkpoint)
    others = [name for name in domains_of(out) if name not in specs] if out is not None else []
    if others:
        raise ValueError(f"bap prune: expected {out} to have no other network, got one with {others}.")
    size = _size_of(specs, checkpoint)
    pruned = prune_(model, torch.zeros(1, 3, size, size))
    if out is not None:
        with folder_lock(out):
            save_checkpoint(out, model, config, specs, kept=(pruned.rows, pruned.columns))
    _table("after pruning", pruned.as_rows())
    _print(
        {
            "before": pruned.before.as_dict(),
            "after": pruned.after.as_dict(),
            "flops": 2 * round(pruned.after.flop * pruned.after.backbone_macs),
            "largest_change": pruned.largest_change,
        }
    )


@app.command()
def speed(
    checkpoint: Checkpoint,
    batch: Annotated[int, typer.Option(help="Images of a call.", min=1)] = 8,
    rounds: Annotated[int, typer.Option(help="Calls of which the median is taken.", min=1)] = 15,
) -> None:
    """Milliseconds and MiB of the physically narrow network beside the dense and the masked one, for every domain."""
    import torch

    from bap.prune.deploy import deploy, speed_report
    from bap.train.checkpoint import load_checkpoint

    model, _, specs = load_checkpoint(checkpoint)
    size = _size_of(specs, checkpoint)
    example = torch.zeros(batch, 3, size, size)
    report = speed_report(model, deploy(model, example), example, rounds)
    _table(f"batch {batch}", report["domains"])
    _print(report)


@app.command()
def export(
    checkpoint: Checkpoint,
    out: Out,
    format: Annotated[list[str], typer.Option("--format", "-f", help="onnx, openvino, pt2, aoti or executorch.")],
    domain: Domains = None,
    batch: Annotated[int, typer.Option(help="Images of a call; the files take no other number.", min=1)] = 1,
    rounds: Annotated[int, typer.Option(help="Calls of which the median is taken.", min=1)] = 15,
) -> None:
    """Write each domain's small network for another runtime; every file is run and compared with the plan."""
    import torch

    from bap.export import export_domain
    from bap.prune.deploy import deploy
    from bap.train.checkpoint import load_checkpoint

    model, _, specs = load_checkpoint(checkpoint, domain or None)
    examples = {name: torch.zeros(batch, 3, size, size) for name, size in _sizes_of(specs, checkpoint).items()}
    narrow = deploy(model, next(iter(examples.values()))).model
    files = [
        row.as_dict()
        for name, example in examples.items()
        for row in export_domain(narrow, name, example, out, format, rounds=rounds)
    ]
    _table(f"batch {batch}, {torch.get_num_threads()} threads", files)
    _print({"batch": batch, "threads": torch.get_num_threads(), "files": files})


@app.command("eval")
def evaluate_command(
    checkpoint: Checkpoint,
    domain: Domains = None,
    split: Annotated[SplitName, typer.Option(help="Which images.")] = SplitName.test,
    root: Root = None,
    predictions: Annotated[
        Path | None, typer.Option(help="Write the decathlon's results.json for its server in place of accuracies.")
    ] = None,
) -> None:
    """Accuracy of every domain, or predictions for a benchmark with hidden labels."""
    from bap.files import write_json
    from bap.train.domains import suite_of
    from bap.train.evaluate import evaluate, predict

    model, config, domains = _loaded(checkpoint, domain, root, split.value)
    if predictions is not None:
        answers = [answer for item in domains.values() for answer in predict(model, item, split.value)]
        write_json(predictions, answers)
        _print(
            {
                "predictions": str(predictions),
                "split": split.value,
                "domains": list(domains),
                "missing": [name for name in suite_of(config) if name not in domains],
                "images": len(answers),
            }
        )
        return
    accuracy = {name: evaluate(model, item, split.value).percent for name, item in domains.items()}
    _table(split.value, [{"domain": name, "accuracy": value} for name, value in accuracy.items()])
    _print({"split": split.value, "accuracy": accuracy, "mean": sum(accuracy.values()) / len(accuracy)})


@app.command("add-domain")
def add_domain_command(
    checkpoint: Checkpoint,
    name: Annotated[str, typer.Argument(help="The new domain.")],
    set_: Set = None,
    like: Annotated[str | None, typer.Option(help="Domain to start from; none starts with all channels on.")] = None,
    progress: Progress = True,
) -> None:
    """Train a new domain on a finished network; the files of the others are not touched."""
    from bap.config import override_values
    from bap.train.new_domain import add_domain

    spec = add_domain(checkpoint, name, override_values(set_ or []), like, progress=progress)
    _print({key: value for key, value in spec.items() if key != "classes"})


@app.command()
def info(checkpoint: Checkpoint, domain: Domains = None) -> None:
    """Settings and domains of a trained network, with what each keeps and costs."""
    import torch

    from bap.prune.counting import count
    from bap.train.checkpoint import load_checkpoint

    model, config, specs = load_checkpoint(checkpoint, domain or None)
    size = _size_of(specs, checkpoint)
    cost = count(model, torch.zeros(1, 3, size, size))
    rows = [
        {"domain": name, "classes": len(spec["classes"]), "kept": spec.get("kept"), "accuracy": spec.get("accuracy")}
        for name, spec in specs.items()
    ]
    _table(f"{config.model.name}, budget {config.budget.beta:g} of {config.budget.measure}", rows)
    _print({"config": config.as_dict(), "domains": rows, "cost": cost.as_dict()})


@app.command()
def scores(
    accuracies: Annotated[Path, typer.Argument(help="JSON, {domain: accuracy in per cent}, or a run's results.json.")],
    baseline: Annotated[str, typer.Option(help="'decathlon', 'sketch', or a JSON file like the first.")] = "decathlon",
    flop: Annotated[float, typer.Option(help="Multiply-adds relative to the backbone.")] = 1.0,
    params: Annotated[float, typer.Option(help="Parameters relative to the backbone.")] = 1.0,
) -> None:
    """S, S_O, S_P and the combined score of given accuracies."""
    from bap.files import read_json
    from bap.results.run import read_accuracies
    from bap.results.scores import PUBLISHED_BASELINES, named_scores
    from bap.train.run_log import checked_results

    content = read_json(accuracies)
    split = "test"
    if isinstance(content, dict) and "accuracy" in content:
        results = checked_results(content, accuracies)
        flop, params, accuracy = results["cost"]["flop"], results["cost"]["params"], results["accuracy"]
        split = results.get("split", split)
    else:
        accuracy = read_accuracies(accuracies)
    base = PUBLISHED_BASELINES[baseline] if baseline in PUBLISHED_BASELINES else read_accuracies(baseline)
    _print(named_scores(accuracy, base, flop, params, baseline, split))


@app.command()
def report(runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs.")], out: Out) -> None:
    """Table, pictures and report.md of finished runs."""
    from bap.results.report import make_report
    from bap.train.lock import folder_lock

    with folder_lock(out):
        _print({"report": str(make_report(runs, out))})


app.command()(study)
app.command()(serve)


@app.command("estimate")
def estimate_command(
    config: Config = None, set_: Set = None, steps: Annotated[int, typer.Option(help="Steps to measure.", min=1)] = 3
) -> None:
    """Hours and memory that a recipe would take here, from measured steps; reads no data."""
    from bap.config import load_config
    from bap.results.estimate import estimate

    _print(estimate(load_config(config, set_ or []), steps))


@app.command()
def demo(out: Out, set_: Set = None, progress: Progress = True) -> None:
    """Pre-train, train at half the budget, prune, evaluate and report on the built-in suite."""
    from bap.results.demo import run_demo

    _print(run_demo(out, set_ or [], lambda line: typer.echo(line, err=True), progress=progress))
