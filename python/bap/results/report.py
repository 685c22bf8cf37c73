"""Plots and a Markdown report of finished runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bap.files import FileError, write_bytes
from bap.prune.layers import SwitchBank
from bap.results.published import DECATHLON_ROWS, SKETCH_ROWS
from bap.results.scores import shown_score
from bap.train.checkpoint import load_checkpoint
from bap.train.run_log import read_metrics, read_results

__all__ = ["make_report", "markdown_table", "plot_accuracy", "plot_curves", "plot_kept", "results_table", "speed_table"]


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _saved(figure: Any, path: Path) -> Path:
    import io

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight")
    _pyplot().close(figure)
    write_bytes(path, buffer.getvalue())
    return path


def plot_kept(checkpoint: str | Path, path: str | Path) -> Path:
    """Plots the channels that each domain keeps: a row for every domain, a block for every layer.

    Args:
        checkpoint: folder of a trained network.
        path: the PNG file.
    """
    model, _, _ = load_checkpoint(checkpoint)
    bank = SwitchBank(model)
    masks = bank.masks()
    pyplot = _pyplot()
    order = torch.cat([masks, masks.any(0, keepdim=True), masks.all(0, keepdim=True)]).float().numpy()
    labels = [*bank.domains, "union", "intersection"]
    figure, axes = pyplot.subplots(figsize=(14, 0.45 * len(labels) + 1.2))
    axes.imshow(order, aspect="auto", cmap="Greens", interpolation="nearest", vmin=0, vmax=1.3)
    axes.set_yticks(range(len(labels)), labels)
    edges = np.cumsum([0, *bank.sizes])
    axes.vlines(edges[1:-1] - 0.5, -0.5, len(labels) - 0.5, colors="black", linewidth=0.8)
    axes.hlines(len(bank.domains) - 0.5, -0.5, edges[-1] - 0.5, colors="black", linewidth=1.5)
    axes.set_xticks((edges[:-1] + edges[1:]) / 2 - 0.5, bank.names, rotation=60, ha="right", fontsize=7)
    axes.set_title("Channels that are on (green), layer by layer")
    return _saved(figure, Path(path))


def plot_accuracy(results: Sequence[tuple[str, dict[str, Any]]], path: str | Path) -> Path:
    """Accuracy of every domain, and their mean, against the budget, for runs given as (name, results).

    Runs of one budget are averaged; their spread is drawn.
    """
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(6.5, 4.2))
    budgets = sorted({run["beta"] for _, run in results})
    names = _domains_of(results)
    # A mean over other domains is another quantity.
    shown = [*names, "mean"] if all(len(run["accuracy"]) == len(names) for _, run in results) else names
    for name in shown:
        values = {
            beta: [
                run["mean_accuracy"] if name == "mean" else run["accuracy"][name]
                for _, run in results
                if run["beta"] == beta and (name == "mean" or name in run["accuracy"])
            ]
            for beta in budgets
        }
        points = {beta: accuracies for beta, accuracies in values.items() if accuracies}
        means = [float(np.mean(accuracies)) for accuracies in points.values()]
        spread = [float(np.std(accuracies)) for accuracies in points.values()]
        axes.errorbar(
            list(points), means, spread, marker="o", label=name, linewidth=3 if name == "mean" else 1.2, capsize=2
        )
    axes.set_xlabel("budget β")
    splits = sorted({run.get("split", "unrecorded split") for _, run in results})
    axes.set_ylabel(f"accuracy, % ({', '.join(splits)})")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    return _saved(figure, Path(path))


def plot_curves(folder: str | Path, path: str | Path) -> Path:
    """Accuracy, kept share and multiplier of every domain, and union and intersection, over the epochs of a run."""
    records = read_metrics(folder)
    if not records:
        raise FileError(f"plot_curves(): expected {Path(folder, 'metrics.jsonl')} to have records, got none.")
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(1, 4, figsize=(16, 3.4))
    epochs = [record["epoch"] for record in records]
    for axis, key, title in zip(
        axes, ("evaluated", "kept", "multiplier"), ("accuracy, %", "kept share", "multiplier λ"), strict=False
    ):
        for name in records[0]["domains"]:
            axis.plot(epochs, [record["domains"].get(name, {}).get(key) for record in records], label=name)
        axis.set_title(title)
    for key in ("union", "intersection"):
        axes[3].plot(epochs, [record[key] for record in records], label=key)
    axes[3].set_title("sharing")
    for axis in axes:
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    axes[3].legend(fontsize=7)
    return _saved(figure, Path(path))


def _domains_of(results: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """Domains of all runs, in the order in which they come."""
    return list(dict.fromkeys(name for _, run in results for name in run["accuracy"]))


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, without a line end after it."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, *rows]).replace("\n", f"\n|{'---|' * len(head)}\n", 1)


def results_table(results: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """A Markdown table, a row for every run; a domain that a run does not have is a dash.

    S of a part of the domains, or of validation images, says so in its cell.
    """
    names = _domains_of(results)
    head = ["run", "β", "sharing", "split", *names, "mean", "S", "FLOP ×", "exact FLOP ×", "Params ×", "union", "∩"]
    rows = []
    for title, run in results:
        cost = run["cost"]
        score = shown_score(run.get("scores"))
        s = "–" if score is None else f"{score[0]:.0f}" + (f" ({score[1]})" if score[1] else "")
        cells = [title, f"{run['beta']:g}", run["sharing"] or "none", run.get("split", "not recorded")]
        cells += [f"{run['accuracy'][name]:.1f}" if name in run["accuracy"] else "–" for name in names]
        several = "" if len(run["accuracy"]) == len(names) else f" ({len(run['accuracy'])} domains)"
        cells += [f"{run['mean_accuracy']:.1f}{several}", s]
        cells += [f"{cost[key]:.3f}" for key in ("flop", "exact_flop", "params")]
        cells += [f"{run['union']:.3f}", f"{run['intersection']:.3f}"]
        rows.append(cells)
    return markdown_table(head, rows)


def speed_table(report: Mapping[str, Any]) -> str:
    """What :func:`bap.prune.deploy.speed_report` returns as a Markdown table, with a line on memory."""
    rows, parameters, memory = report["domains"], report["parameters"], report["bytes"]
    cells = [[f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row.values()] for row in rows]
    return (
        f"{markdown_table(list(rows[0]), cells)}\n\nOne forward of {report['batch']} images, {report['threads']} "
        f"threads, median. All domains together hold {parameters['after']:,} parameters instead of "
        f"{parameters['before']:,}: {memory['after'] / 2**20:.2f} MiB instead of {memory['before'] / 2**20:.2f}."
    )


def _published(data: str, results: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """Published rows, if every run is comparable: test images of all domains."""
    rows = {"decathlon": DECATHLON_ROWS, "sketch": SKETCH_ROWS}.get(data, ())
    if not rows:
        return []
    lines = ["", "## Published", ""]
    for title, run in results:
        score = shown_score(run.get("scores"))
        comparable = run.get("protocol", {}).get("data") == data and run.get("protocol", {}).get("whole")
        if score is None or score[1] or not comparable or not run["scores"].get("published_baseline"):
            reason = "without a score" if score is None else score[1] or "an extract, or relative to another baseline"
            return [
                *lines,
                "Published rows are left out: they are of the test images of all domains, and "
                f"{title} is not ({reason}).",
            ]
    lines += [
        "[P]: stated in a published table or public code; [Q]: quoted from memory. Recomputed: S of the row's "
        "published accuracies by our formula, without a mark; they are printed with two digits, which moves S by "
        "up to 0.6 %.",
        "",
        "| Method | S | Mark | S recomputed | FLOP × | Params × |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        known = ["–" if value is None else f"{value:g}" for value in (row.flop, row.params)]
        again = "–" if row.recomputed is None else f"{row.recomputed:.0f}"
        lines.append(f"| {row.method} | {row.s:.0f} | [{row.mark}] | {again} | {known[0]} | {known[1]} |")
    return lines


def make_report(folders: Sequence[str | Path], out: str | Path, served: str | None = None) -> Path:
    """Writes report.md and its pictures for one or several finished runs.

    Args:
        folders: of the runs; pictures of channels and curves are those of the first.
        out: folder for the report.
        served: table of times of the pruned network, see :func:`speed_table`.

    Returns:
        The path of report.md.

    Raises:
        ValueError: if no run is given.
        FileError: if a run has no results, or damaged ones.
    """
    out = Path(out)
    if not folders:
        raise ValueError("make_report(): expected `folders` to name a run, got none.")
    results = [(Path(folder).resolve().name, read_results(folder)) for folder in folders]
    first = Path(folders[0])
    _, config, _ = load_checkpoint(first / "checkpoint")
    plot_kept(first / "checkpoint", out / "kept.png")
    plot_curves(first, out / "curves.png")
    plot_accuracy(results, out / "accuracy_budget.png")
    lines = ["# Budget-aware pruning", "", results_table(results), ""]
    lines += [
        "FLOP × is the mean over domains of the multiply-adds of the channels that are on, as the papers count; exact "
        "FLOP × leaves out filters that nothing reads. Params × is what all domains need together: shared weights left "
        "after pruning, batch norm of every domain, one bit for each switch; classifiers excluded.",
        "",
        *(["## Time and memory as it is served", "", served, ""] if served else []),
        f"## Channels of {first.name}",
        "",
        "![channels](kept.png)",
        "",
        "## Accuracy against budget",
        "",
        "![accuracy](accuracy_budget.png)",
        "",
        f"## Training of {first.name}",
        "",
        "![curves](curves.png)",
    ]
    lines += _published(config.data.suite, results)
    write_bytes(out / "report.md", ("\n".join(lines) + "\n").encode())
    return out / "report.md"
