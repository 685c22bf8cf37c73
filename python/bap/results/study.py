"""A study: runs over budgets, sharing losses and seeds of one suite; it can be stopped and resumed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bap.config import Config
from bap.data import Domain
from bap.files import write_bytes, write_json
from bap.results.compare import Comparison, comparison_cells, comparison_csv, comparison_table
from bap.results.grid import Cell, StudyGrid
from bap.results.report import csv_table, latex_table, markdown_table
from bap.results.run import is_finished, scored, train_run
from bap.results.scores import shown_score
from bap.train.distill import learns_from_dense
from bap.train.domains import check_source, load_domains, source_of, suite_of
from bap.train.evaluate import check_splits, final_split
from bap.train.lock import folder_lock
from bap.train.pretrain import check_backbone, pretrain
from bap.train.run_log import read_results

__all__ = ["StudyGrid", "pretrained", "study", "study_cells", "study_table"]


def pretrained(
    config: Config, domains: dict[str, Domain], folder: Path, progress: bool = False, name: str = "backbone"
) -> Path:
    """File with the backbone of a seed, trained on the source if it is missing.

    Raises:
        ValueError: if the file there was trained with other settings or on another source.
        FileError: if it is damaged.
    """
    path = folder / f"{name}_seed{config.run.seed}.safetensors"
    source = source_of(config, domains)
    if not path.exists():
        if source not in domains:
            raise ValueError(
                f"pretrained(): expected the source {source!r} to be among the domains, got {list(domains)}."
            )
        pretrain(config, domains[source], path, progress, resume=True)
    else:
        check_backbone(path, config, source)
    return path


def alone_on(config: Config, name: str) -> Config:
    """Settings of a whole network for one domain, all of it trained from the source's."""
    return config.replace(
        teacher=None,
        distill_weight=0.0,
        anneal=None,
        beta=1.0,
        sharing=None,
        train_backbone=True,
        lr_backbone=config.optimiser.lr_head / 2,
        source=name,
    )


def finetuned(config: Config, name: str, domain: Domain, folder: Path, progress: bool) -> float:
    """Accuracy of the whole network for one domain, which is trained if it is missing."""
    path = folder / f"finetune_{name}_seed{config.run.seed}"
    alone = alone_on(config, name)
    if not is_finished(path, alone):
        train_run(alone, path, resume=True, baseline={}, domains={name: domain}, progress=progress)
    return float(read_results(path)["accuracy"][name])


def _baseline(config: Config, domains: dict[str, Domain], folder: Path, progress: bool) -> dict[str, float]:
    """Accuracy of a whole network for each domain: what S is relative to."""
    return {name: finetuned(config, name, domain, folder, progress) for name, domain in domains.items()}


def said_of(name: str, results: dict[str, Any]) -> str:
    """The line about a finished run."""
    return f"{name}: accuracy {results['mean_accuracy']:.2f} %, Params {results['cost']['params']:.3f}"


def check_study(config: Config, grid: StudyGrid) -> None:
    """Refuses settings that no cell could use, before anything is trained.

    Raises:
        ValueError: for them.
    """
    for seed in grid.seeds:
        for cell in grid.cells(seed):
            grid.settings(config, cell)
    if "narrow-taught" in grid.compare and not grid.needs_dense(config):
        raise ValueError(
            "study(): expected the baseline 'narrow-taught' beside the method or a variant that learns from the dense "
            f"network, got the teacher {config.distill.teacher!r}. Hint: -s teacher=dense -s distill_weight=0.25"
        )
    check_source(config, config.data.domains or suite_of(config))


def checked_domains(config: Config) -> dict[str, Domain]:
    """The data of a study.

    Raises:
        ValueError: if they are not what the settings need.
    """
    domains = load_domains(config)
    check_source(config, domains)
    check_splits(domains, config.data.evaluate_on)
    final_split(domains, config.data.evaluate_on)
    return domains


def study(
    config: Config,
    folder: str | Path,
    grid: StudyGrid | None = None,
    say: Callable[[str], None] = print,
    progress: bool = False,
) -> Path:
    """Runs the cells that are missing, and writes study.json, study.md, and the tables as CSV and LaTeX.

    Args:
        config: settings that all runs share; seed, budget and sharing loss are set here. The teacher ``dense`` is the
            dense network that the study trains for each seed.
        folder: for the runs; finished ones are kept, an unfinished one goes on from its last epoch.
        grid: the runs; None: those of ``StudyGrid()``.
        say: told of every finished run.
        progress: whether the runs print their own lines, to the error stream.

    Returns:
        The path of study.md.

    Raises:
        ValueError: for settings that cannot be used, before anything is trained, and for runs of other settings in the
            folder.
        FileError: if files cannot be written, or are damaged, or another study writes into the folder.
    """
    folder = Path(folder)
    grid = grid or StudyGrid()
    check_study(config, grid)
    with folder_lock(folder):
        domains = checked_domains(config)
        rows: list[dict[str, Any]] = []
        compared: list[dict[str, Any]] = []
        for seed in grid.seeds:
            base, reference = prepared(config, grid, seed, domains, folder, progress)
            if reference:
                write_json(folder / f"baseline_seed{seed}.json", reference)
            runs = comparison(base, domains, folder, reference, say, progress)
            for cell in grid.cells(seed):
                run_cell(runs, grid, cell, reference, say, progress)
                rows.append(row_of(folder, cell, reference))
                _write(folder, config, rows, compared)
            if grid.compare or grid.variants:
                own = [row for row in rows if row["seed"] == seed]
                compared += compared_rows(runs, own, grid, say, progress)
                _write(folder, config, rows, compared)
        return folder / "study.md"


def prepared(
    config: Config, grid: StudyGrid, seed: int, domains: dict[str, Domain], folder: Path, progress: bool
) -> tuple[Config, dict[str, float]]:
    """Settings of a seed with its backbone, and its baseline; what is missing is trained."""
    base = config.replace(seed=seed)
    base = base.replace(weights=str(pretrained(base, domains, folder, progress)))
    return base, _baseline(base, domains, folder, progress) if grid.baseline else {}


def row_of(folder: Path, cell: Cell, reference: dict[str, float]) -> dict[str, Any]:
    """The results of a finished cell, scored: it may have been run before its baseline was."""
    results = read_results(folder / cell.name)
    return {"seed": cell.seed, "variant": cell.variant, **results, **scored(results, reference)}


def run_cell(
    runs: Comparison,
    grid: StudyGrid,
    cell: Cell,
    reference: dict[str, float],
    say: Callable[[str], None],
    progress: bool,
) -> None:
    """Runs a cell if it is not finished, and before it the dense network that it may learn from."""
    settings, path = grid.settings(runs.original, cell), runs.folder / cell.name
    if learns_from_dense(settings):
        runs.dense()
        settings = settings.replace(teacher=runs.teacher)
    if not is_finished(path, settings):
        domains = dict(runs.domains)
        done = train_run(settings, path, resume=True, baseline=reference, domains=domains, progress=progress)
        say(said_of(path.name, done))


def _write(folder: Path, config: Config, rows: list[dict[str, Any]], compared: list[dict[str, Any]]) -> None:
    content = {"config": config.as_dict(), "torch": torch.__version__, "rows": rows, "compared": compared}
    write_json(folder / "study.json", content)
    text = study_table(rows)
    if compared:
        text += (
            f"\n\n{comparison_table(compared)}\n\nDifference: of the mean accuracy to the row marked reference, paired "
            "by seed, with half of Student's 95 % interval. Training: seconds of all epochs, without pre-training; for "
            "masks by saliency with those of the dense network that they are chosen on."
        )
    write_bytes(folder / "study.md", (text + "\n").encode())
    titled = [(f"{_method(row)} at {row['beta']:g}, seed {row['seed']}", row) for row in rows]
    write_bytes(folder / "study.csv", csv_table(titled).encode())
    write_bytes(folder / "study.tex", (latex_table(*study_cells(rows), 3) + "\n").encode())
    if compared:
        write_bytes(folder / "compared.csv", comparison_csv(compared).encode())
        write_bytes(folder / "compared.tex", (latex_table(*comparison_cells(compared), 3) + "\n").encode())


def comparison(
    base: Config,
    domains: dict[str, Domain],
    folder: Path,
    reference: dict[str, float],
    say: Callable[[str], None],
    progress: bool,
) -> Comparison:
    """The baselines of one seed; nothing is run yet."""

    def run(config: Config, name: str) -> dict[str, Any]:
        path = folder / name
        if not is_finished(path, config):
            done = train_run(config, path, resume=True, baseline=reference, domains=domains, progress=progress)
            say(said_of(name, done))
        return read_results(path)

    def narrow_backbone(config: Config, name: str) -> Path:
        return pretrained(config, domains, folder, progress, name)

    return Comparison(base, domains, folder, run, narrow_backbone)


def compared_rows(
    runs: Comparison,
    rows: Sequence[dict[str, Any]],
    grid: StudyGrid,
    say: Callable[[str], None],
    progress: bool,
) -> list[dict[str, Any]]:
    """Rows of the variants and baselines of one seed, beside the cells of the reference's sharing loss."""
    base, seed = runs.original, runs.config.run.seed

    def row(beta: float, method: str, matched: str, results: dict[str, Any], more: float = 0.0) -> dict[str, Any]:
        cost = results["cost"]
        return {
            "seed": seed,
            "beta": beta,
            "method": method,
            "match": matched,
            "accuracy": results["mean_accuracy"],
            **{key: cost[key] for key in ("flop", "exact_flop", "params")},
            "seconds": more + results.get("training_seconds", results.get("seconds", 0.0)),
        }

    def dense_seconds() -> float:
        return float(runs.dense().get("training_seconds", 0.0))

    def cell_row(results: dict[str, Any], matched: str) -> dict[str, Any]:
        cell = Cell(results["beta"], grid.reference, seed, results["variant"])
        taught = dense_seconds() if learns_from_dense(grid.settings(base, cell)) else 0.0
        return row(cell.beta, cell.variant or cell.sharing or "no sharing loss", matched, results, taught)

    selected = []
    for results in [entry for entry in rows if not entry["variant"] and entry["sharing"] == grid.reference]:
        beta = results["beta"]
        selected.append(cell_row(results, "reference"))
        selected += [cell_row(entry, "budget") for entry in rows if entry["variant"] and entry["beta"] == beta]
        name = Cell(beta, grid.reference, seed).name
        if "dense" in grid.compare:
            selected.append(row(beta, "dense", "", runs.dense()))
        if "alone" in grid.compare:
            selected.append(row(beta, "alone", "", _alone(base, dict(runs.domains), runs.folder, progress)))
        for baseline in grid.compare:
            if baseline in ("dense", "alone"):
                continue
            for matched in grid.match:
                target = results["cost"][matched]
                if baseline in ("narrow", "narrow-taught"):
                    teaching = grid.teaching(base) if baseline == "narrow-taught" else None
                    narrow = runs.narrow(target, teaching)
                    if narrow is None:
                        say(f"narrow: {base.model.name} has no network of at most {target:.3f} of its multiply-adds")
                    else:
                        first = 0.0 if teaching is None else dense_seconds()
                        selected.append(row(beta, baseline, matched, narrow, first))
                    continue
                chosen = runs.masked(baseline, name, matched, target)
                selected.append(
                    row(beta, baseline, matched, chosen, 0.0 if baseline == "magnitude" else dense_seconds())
                )
    return selected


def _alone(config: Config, domains: dict[str, Domain], folder: Path, progress: bool) -> dict[str, Any]:
    """A whole network for each domain, as one row."""
    accuracy = _baseline(config, domains, folder, progress)
    seconds = [
        read_results(folder / f"finetune_{name}_seed{config.run.seed}").get("training_seconds", 0.0) for name in domains
    ]
    return {
        "mean_accuracy": statistics.fmean(accuracy.values()),
        "cost": {"flop": 1.0, "exact_flop": 1.0, "params": float(len(domains))},
        "training_seconds": sum(seconds),
    }


def _shown(values: Sequence[float], digits: int) -> str:
    if not values:
        return "–"
    text = f"{statistics.fmean(values):.{digits}f}"
    return text if len(values) < 2 else f"{text} ± {statistics.stdev(values):.{digits}f}"


def _method(row: Mapping[str, Any]) -> str:
    return str(row.get("variant") or row["sharing"] or "none")


def study_table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of means, and ± the standard deviation over the seeds where there are several."""
    return markdown_table(*study_cells(rows))


def study_cells(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of :func:`study_table`."""
    cells: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["beta"], _method(row)), []).append(row)
    names = list(dict.fromkeys(name for row in rows for name in row["accuracy"]))
    head = ["β", "method", "split", "seeds", *names, "mean", "S", "FLOP ×", "exact FLOP ×", "Params ×"]
    lines = []
    for (beta, sharing), cell in sorted(cells.items(), key=lambda item: -item[0][0]):
        split = ", ".join(dict.fromkeys(row.get("split", "not recorded") for row in cell))
        line = [f"{beta:g}", sharing, split, str(len(cell))]
        line += [_shown([row["accuracy"][name] for row in cell if name in row["accuracy"]], 1) for name in names]
        line.append(_shown([row["mean_accuracy"] for row in cell], 1))
        shown = [score for score in (shown_score(row.get("scores")) for row in cell) if score is not None]
        notes = ", ".join(dict.fromkeys(note for _, note in shown if note))
        line.append(_shown([value for value, _ in shown], 0) + (f" ({notes})" if notes else ""))
        line += [_shown([row["cost"][key] for row in cell], 3) for key in ("flop", "exact_flop", "params")]
        line += [_shown([row[key] for row in cell], 3) for key in ("union", "intersection")]
        line.append(_shown([sum(row["projected_off"].values()) for row in cell], 0))
        lines.append(line)
    return [*head, "union", "∩", "projected"], lines
