"""Pictures and a Markdown report of finished runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bap.checkpoint import load_checkpoint
from bap.facts import SwitchBank
from bap.files import write_bytes
from bap.journal import read_metrics, read_results
from bap.published import DECATHLON_ROWS, SKETCH_ROWS

__all__ = ["make_report", "plot_accuracy", "plot_curves", "plot_kept", "results_table"]


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _saved(figure: Any, path: Path) -> Path:
    import io

    held = io.BytesIO()
    figure.savefig(held, format="png", dpi=130, bbox_inches="tight")
    _pyplot().close(figure)
    write_bytes(path, held.getvalue())
    return path


def plot_kept(checkpoint: str | Path, path: str | Path) -> Path:
    """A picture of the channels that each domain keeps: a row for every domain, a block for every layer.

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
    budgets = sorted({one["beta"] for _, one in results})
    names = list(results[0][1]["accuracy"])
    for name in [*names, "mean"]:
        values = [
            [
                one["mean_accuracy"] if name == "mean" else one["accuracy"][name]
                for _, one in results
                if one["beta"] == beta
            ]
            for beta in budgets
        ]
        means = [float(np.mean(one)) for one in values]
        spread = [float(np.std(one)) for one in values]
        axes.errorbar(budgets, means, spread, marker="o", label=name, linewidth=3 if name == "mean" else 1.2, capsize=2)
    axes.set_xlabel("budget β")
    axes.set_ylabel("test accuracy, %")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    return _saved(figure, Path(path))


def plot_curves(folder: str | Path, path: str | Path) -> Path:
    """Accuracy, kept share and multiplier of every domain, and union and intersection, over the epochs of a run."""
    records = read_metrics(folder)
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(1, 4, figsize=(16, 3.4))
    epochs = [one["epoch"] for one in records]
    for axis, key, title in zip(
        axes, ("evaluated", "kept", "multiplier"), ("accuracy, %", "kept share", "multiplier λ"), strict=False
    ):
        for name in records[0]["domains"]:
            axis.plot(epochs, [one["domains"][name][key] for one in records], label=name)
        axis.set_title(title)
    for key in ("union", "intersection"):
        axes[3].plot(epochs, [one[key] for one in records], label=key)
    axes[3].set_title("sharing")
    for axis in axes:
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    axes[3].legend(fontsize=7)
    return _saved(figure, Path(path))


def results_table(results: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """A Markdown table, a row for every run."""
    names = list(results[0][1]["accuracy"])
    head = ["run", "β", "sharing", *names, "mean", "S", "FLOP ×", "exact FLOP ×", "Params ×", "union", "∩"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for title, one in results:
        cost = one["cost"]
        s = f"{one['scores']['S']:.0f}" if "scores" in one else "–"
        cells = [title, f"{one['beta']:g}", one["sharing"] or "none"]
        cells += [f"{one['accuracy'][name]:.1f}" for name in names]
        cells += [f"{one['mean_accuracy']:.1f}", s]
        cells += [f"{cost[key]:.3f}" for key in ("flop", "exact_flop", "params")]
        cells += [f"{one['union']:.3f}", f"{one['intersection']:.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _published(data: str) -> list[str]:
    rows = {"decathlon": DECATHLON_ROWS, "sketch": SKETCH_ROWS}.get(data, ())
    if not rows:
        return []
    lines = ["", "## Published", "", "[P]: stated in a published table or public code; [Q]: quoted from memory.", ""]
    lines += ["| Method | S | FLOP × | Params × | Mark |", "|---|---|---|---|---|"]
    for row in rows:
        known = ["–" if value is None else f"{value:g}" for value in (row.flop, row.params)]
        lines.append(f"| {row.method} | {row.s:.0f} | {known[0]} | {known[1]} | [{row.mark}] |")
    return lines


def make_report(folders: Sequence[str | Path], out: str | Path, served: str | None = None) -> Path:
    """Writes report.md and its pictures for one or several finished runs.

    Args:
        folders: of the runs; pictures of channels and curves are those of the first.
        out: folder for the report.
        served: table of times of the pruned network, see :func:`bap.deploy.speed_table`.

    Returns:
        The path of report.md.

    Raises:
        FileError: if a run has no results.
    """
    out = Path(out)
    results = [(Path(folder).name, read_results(folder)) for folder in folders]
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
    lines += _published(config.data)
    write_bytes(out / "report.md", ("\n".join(lines) + "\n").encode())
    return out / "report.md"
