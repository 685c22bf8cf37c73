"""Pictures of finished runs, as PNG files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bap.files import FileError, write_bytes
from bap.prune.layers import SwitchBank, conv_specs
from bap.train.checkpoint import load_checkpoint
from bap.train.run_log import read_metrics
from bap_kernels import set_domain

__all__ = [
    "overlap",
    "plot_accuracy",
    "plot_budgets",
    "plot_curves",
    "plot_kept",
    "plot_layers",
    "plot_overlap",
]

# Lines of one picture differ in colour, dashes and marks: curves of domains often lie on one another.
_DASHES = ("-", "--", "-.", ":")
_MARKS = "osD^vP*X<>"


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


def _style(number: int) -> dict[str, Any]:
    return {
        "color": f"C{number % 10}",
        "linestyle": _DASHES[number % len(_DASHES)],
        "marker": _MARKS[number % len(_MARKS)],
        "markersize": 4,
        "linewidth": 1.4,
    }


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


def _matrix(axes: Any, values: np.ndarray, rows: Sequence[str], columns: Sequence[str], size: float) -> Any:
    """Shares from 0 to 1 as colours and two digits."""
    image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0, vmax=1)
    axes.set_yticks(range(len(rows)), rows, fontsize=size + 1)
    axes.set_xticks(range(len(columns)), columns, rotation=60, ha="right", fontsize=size)
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            text = "1" if value > 0.995 else f"{value:.2f}"[1:]
            axes.text(
                column, row, text, ha="center", va="center", fontsize=size, color="black" if value > 0.6 else "white"
            )
    return image


def plot_layers(checkpoint: str | Path, path: str | Path) -> Path:
    """Plots the share of every layer's channels that each domain keeps, and that all and any of them keep.

    Args:
        checkpoint: folder of a trained network.
        path: the PNG file.
    """
    model, _, _ = load_checkpoint(checkpoint)
    bank = SwitchBank(model)
    masks = bank.masks()
    rows = torch.cat([masks, masks.any(0, keepdim=True), masks.all(0, keepdim=True)]).double()
    shares = np.array([[float(part.mean()) for part in row.split(bank.sizes)] for row in rows])
    labels = [*bank.domains, "union", "intersection"]
    names = [f"{name} ({size})" for name, size in zip(bank.names, bank.sizes, strict=True)]
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(max(6.0, 0.5 * len(names) + 2.5), 0.38 * len(labels) + 1.8))
    image = _matrix(axes, shares, labels, names, 7)
    axes.axhline(len(bank.domains) - 0.5, color="white", linewidth=2)
    axes.set_title("Share of each layer's input channels that is on (channels in brackets)")
    figure.colorbar(image, ax=axes, fraction=0.03, pad=0.01)
    return _saved(figure, Path(path))


def overlap(masks: Tensor, costs: Tensor) -> Tensor:
    """Common cost of two domains' channels over the cost of those that either keeps: (D, D), from (D, M) and (M,).

    Two domains that keep nothing overlap wholly.

    Examples:
        >>> import torch
        >>> from bap.results.pictures import overlap
        >>> overlap(torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 1.0]]), torch.tensor([2.0, 1.0, 1.0])).tolist()
        [[1.0, 0.5], [0.5, 1.0]]
    """
    weighted = masks.double() * costs.double()
    common = weighted @ masks.double().T
    own = weighted.sum(1)
    either = own[:, None] + own[None] - common
    return torch.where(either > 0, common / either.clamp_min(1e-300), torch.ones_like(either))


def plot_overlap(checkpoint: str | Path, path: str | Path) -> Path:
    """Plots which domains keep the same channels: intersection over union of each pair, in multiply-adds.

    Args:
        checkpoint: folder of a trained network.
        path: the PNG file.
    """
    model, config, specs = load_checkpoint(checkpoint)
    bank = SwitchBank(model)
    set_domain(model, bank.domains[0])
    size = next((int(spec["size"]) for spec in specs.values() if spec.get("size")), config.data.size or 64)
    macs = conv_specs(model, torch.zeros(1, 3, size, size))
    costs = torch.cat(
        [torch.full((macs[name].in_channels,), float(macs[name].macs_per_channel)) for name in bank.names]
    )
    values = overlap(bank.masks(), costs).numpy()
    pyplot = _pyplot()
    side = 0.55 * len(bank.domains) + 2
    figure, axes = pyplot.subplots(figsize=(side + 0.8, side))
    image = _matrix(axes, values, bank.domains, bank.domains, 8)
    axes.set_title("Overlap of domains: ∩ / ∪ in multiply-adds", fontsize=10)
    figure.colorbar(image, ax=axes, fraction=0.045, pad=0.02)
    return _saved(figure, Path(path))


def plot_accuracy(results: Sequence[tuple[str, dict[str, Any]]], path: str | Path) -> Path:
    """Accuracy of every domain, and their mean, against the budget, for runs given as (name, results).

    Runs of one budget are averaged; their spread is drawn.
    """
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(7.2, 4.2))
    budgets = sorted({run["beta"] for _, run in results})
    names = list(dict.fromkeys(name for _, run in results for name in run["accuracy"]))
    # A mean over other domains is another quantity.
    shown = [*names, "mean"] if all(len(run["accuracy"]) == len(names) for _, run in results) else names
    for number, name in enumerate(shown):
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
        style = {"color": "black", "linewidth": 2.5, "marker": "o"} if name == "mean" else _style(number)
        axes.errorbar(list(points), means, spread, label=name, capsize=2, **style)
    axes.set_xlabel("budget β")
    splits = sorted({run.get("split", "unrecorded split") for _, run in results})
    axes.set_ylabel(f"accuracy, % ({', '.join(splits)})")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.grid(alpha=0.3)
    return _saved(figure, Path(path))


def _records(folder: str | Path) -> list[dict[str, Any]]:
    records = read_metrics(folder)
    if not records:
        raise FileError(f"plot_curves(): expected {Path(folder, 'metrics.jsonl')} to have records, got none.")
    return records


def _settle_line(axes: Iterable[Any], settled: float | None) -> None:
    for axis in axes:
        if settled is not None:
            axis.axvline(settled, color="grey", linewidth=1, linestyle=(0, (2, 2)), label="switches fixed")


def _settled(folder: Path) -> float | None:
    """The epoch after which the switches were fixed, where that is not the last."""
    from bap.config import load_config

    if not (folder / "config.yaml").exists():
        return None
    config = load_config(folder / "config.yaml")
    epoch = math.ceil(config.switches.freeze_at * config.schedule.epochs)
    return float(epoch) if epoch < config.schedule.epochs else None


def plot_curves(folder: str | Path, path: str | Path) -> Path:
    """Accuracy and loss of every domain, and what all and any of them keep, over the epochs of a run.

    The budget, and the point at which the switches were fixed, are lines.
    """
    records = _records(folder)
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(1, 3, figsize=(16, 4))
    epochs = [record["epoch"] for record in records]
    for axis, key, title in zip(axes, ("evaluated", "loss"), ("accuracy, %", "training loss"), strict=False):
        for number, name in enumerate(records[0]["domains"]):
            values = [record["domains"].get(name, {}).get(key, math.nan) for record in records]
            axis.plot(epochs, values, label=name, markevery=max(1, len(epochs) // 12), **_style(number))
        axis.set_title(title)
    kept = [[values["kept"] for values in record["domains"].values()] for record in records]
    axes[2].fill_between(
        epochs, [min(values) for values in kept], [max(values) for values in kept], alpha=0.3, label="kept, all domains"
    )
    for number, key in enumerate(("union", "intersection")):
        axes[2].plot(epochs, [record[key] for record in records], label=key, **_style(number))
    if all("beta" in record for record in records):
        axes[2].plot(epochs, [record["beta"] for record in records], color="red", linestyle="--", label="budget β")
    axes[2].set_ylim(-0.02, 1.02)
    axes[2].set_title("share of the switched cost")
    _settle_line(axes, _settled(Path(folder)))
    for axis in axes:
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    axes[2].legend(fontsize=7)
    return _saved(figure, Path(path))


def plot_budgets(folder: str | Path, path: str | Path) -> Path:
    """Kept share, budget and multiplier λ over the epochs of a run, in a panel for each domain."""
    records = _records(folder)
    names = list(records[0]["domains"])
    columns = min(5, len(names))
    rows = -(-len(names) // columns)
    pyplot = _pyplot()
    figure, grid = pyplot.subplots(
        rows, columns, figsize=(3.4 * columns, 2.6 * rows + 0.4), sharex=True, sharey=True, squeeze=False
    )
    epochs = [record["epoch"] for record in records]
    settled = _settled(Path(folder))
    most = max(record["domains"].get(name, {}).get("multiplier", 0.0) for record in records for name in names)
    for number, name in enumerate(names):
        axis = grid[number // columns][number % columns]
        values = [record["domains"].get(name, {}) for record in records]
        axis.plot(
            epochs,
            [value.get("kept", math.nan) for value in values],
            color="C2",
            marker="o",
            markersize=3,
            label="kept",
        )
        if all("beta" in record for record in records):
            axis.plot(
                epochs, [record["beta"] for record in records], color="red", linestyle="--", linewidth=1, label="β"
            )
        _settle_line([axis], settled)
        axis.set_title(name, fontsize=9)
        axis.set_ylim(-0.02, 1.02)
        axis.grid(alpha=0.3)
        other = axis.twinx()
        other.plot(
            epochs,
            [value.get("multiplier", math.nan) for value in values],
            color="C4",
            linestyle=":",
            linewidth=1.6,
            label="λ",
        )
        other.set_ylim(-0.02 * max(most, 1e-9), 1.05 * max(most, 1e-9))
        other.tick_params(labelsize=7, colors="C4")
        if number % columns < columns - 1 and number < len(names) - 1:
            other.set_yticklabels([])
        if number == 0:
            lines = [*axis.get_lines(), *other.get_lines()]
            axis.legend(lines, [str(line.get_label()) for line in lines], fontsize=7)
        if number + columns >= len(names):
            axis.set_xlabel("epoch")
            axis.tick_params(labelbottom=True)
    for number in range(len(names), rows * columns):
        grid[number // columns][number % columns].set_visible(False)
    figure.suptitle("Kept share (left scale) under its budget, and the multiplier λ (right scale)", fontsize=11)
    figure.tight_layout()
    return _saved(figure, Path(path))
