"""The figures of the report of training."""

from collections.abc import Callable, Sequence
from typing import Any

from benches.plots import STYLES, Figure, density_axis, draw_panels, group, variants_of
from benches.rows import Row
from benches.summary import layer_rows
from benches.training import summary
from benches.training.curve import Curve, differences
from benches.training.summary import LAYER_TARGETS, OURS, REFERENCE, Setting

LABELS = {
    "masked": "masked autograd",
    "auto": "ours",
    "naive": "naive (no switch gradient)",
    "channels_last": "masked, channels_last",
    "reversed": "masked, batches reversed",
}
CURVES: dict[str, dict[str, Any]] = {
    **{variant: {key: STYLES[variant][key] for key in ("color", "linestyle")} for variant in ("masked", "auto")},
    "channels_last": {"color": "#e7298a", "linestyle": ":"},
    "reversed": {"color": "#66a61e", "linestyle": ":"},
}
PHASES = (("forward", "#1f4fd8"), ("backward", "#80b1d3"), ("SGD", "#4d4d4d"))
PANEL = 3.8  # inches


def label(variant: str) -> str:
    """Return the name of a variant in legends and tables."""
    return LABELS.get(variant, variant)


def _by_panel(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    ordered = [row for setting in summary.settings(rows) for row in rows if summary.setting_of(row) == setting]
    return group(ordered, lambda row: (row.layout, row.mode))


def layer_speedups(rows: Sequence[Row]) -> list[Figure]:
    """Speed-up over masked autograd against density: one line per variant, with the targets."""

    def draw(axis: Any, panel: tuple[str, str], rows: list[Row]) -> None:
        densities = sorted({row.density for row in rows})
        for variant in variants_of(rows):
            if variant == REFERENCE:
                points = [(d, 1.0) for d in densities]
            else:
                means = ((d, summary.speedup(rows, Setting(*panel, d), variant, REFERENCE)) for d in densities)
                points = [(d, mean.value) for d, mean in means if mean]
            if points:
                line = {"label": label(variant), "markersize": 6, "linewidth": 1.6, **STYLES[variant]}
                axis.plot(*zip(*points, strict=True), **line)
        if goals := [(d, LAYER_TARGETS[panel[1]][d]) for d in densities if d in LAYER_TARGETS[panel[1]]]:
            axis.plot(*zip(*goals, strict=True), color="#999999", linewidth=5, alpha=0.35, label="target")
        axis.set_title(f"{panel[0]}, weights {panel[1]}", fontsize=10)
        axis.set_ylabel("speed-up over masked autograd")
        density_axis(axis, densities)

    panels = _by_panel(layer_rows(rows))
    caption = "Forward and backward of single layers: speed-up over masked autograd (geometric mean; higher is faster)."
    return [Figure("layers", caption, draw_panels(panels, draw, PANEL, PANEL))] if panels else []


def _stacked_bars(rows: Sequence[Row], unit: str, parts: Callable[[Row], Sequence[tuple[str, float, str]]]) -> bytes:
    """Draw a bar for every variant and density, made of (name, height, colour), one panel per layout and mode."""

    def draw(axis: Any, panel: tuple[str, str], rows: list[Row]) -> None:
        densities, variants = list(dict.fromkeys(row.density for row in rows)), variants_of(rows)
        ticks = []
        for row in rows:
            position = densities.index(row.density) * (len(variants) + 1) + variants.index(row.variant)
            ticks.append((position, f"{label(row.variant).split()[0]} {row.density:g}"))
            bottom = 0.0
            for name, height, colour in parts(row):
                axis.bar(position, height, 0.85, bottom=bottom, color=colour, label=name)
                bottom += height
        axis.set_xticks(*zip(*ticks, strict=True), rotation=60, ha="right", fontsize=8)
        axis.set_title(f"{panel[0]}, weights {panel[1]}", fontsize=10)
        axis.set_ylabel(unit)

    return draw_panels(_by_panel(rows), draw, PANEL, PANEL)


def step_times(rows: Sequence[Row]) -> list[Figure]:
    """Time of a step by phase."""

    def phases(row: Row) -> list[tuple[str, float, str]]:
        seconds = (row.forward_s, row.backward_s, row.optimiser_s)
        return [(name, (value or 0.0) * 1e3, colour) for (name, colour), value in zip(PHASES, seconds, strict=True)]

    rows = [row for row in summary.step_rows(rows) if row.forward_s is not None]
    caption = "Whole steps of ResNet-26: time by phase (lower is faster)."
    return [Figure("steps", caption, _stacked_bars(rows, "time of a step [ms]", phases))] if rows else []


def step_memory(rows: Sequence[Row]) -> list[Figure]:
    """Memory of a step: bytes saved for the backward, and the peak beyond them."""

    def parts(row: Row) -> list[tuple[str, float, str]]:
        saved, peak = (row.saved_bytes or 0) / 2**20, (row.peak_bytes or 0) / 2**20
        return [("saved for the backward", saved, "#1b9e77"), ("peak beyond that", max(0.0, peak - saved), "#a6761d")]

    rows = [row for row in summary.step_rows(rows) if row.peak_bytes and row.saved_bytes is not None]
    caption = "Whole steps of ResNet-26: memory beyond model and data (lower is less)."
    return [Figure("memory", caption, _stacked_bars(rows, "memory of a step [MiB]", parts))] if rows else []


def loss_curves(curves: Sequence[Curve]) -> list[Figure]:
    """Losses of all variants, with their differences from masked autograd below."""

    def draw(axis: Any, panel: tuple[str, str], curves: dict[str, Curve]) -> None:
        quantity, dtype = panel
        for variant, curve in curves.items():
            if quantity == "loss":
                axis.plot(curve.losses, label=label(variant), linewidth=1.4, **CURVES[variant])
            else:
                # A logarithmic axis cannot show exact zeros.
                points = [(step, d) for step, d in enumerate(differences(curves[REFERENCE], curve)) if d]
                axis.plot([step for step, _ in points], [d for _, d in points], linewidth=1.0, **CURVES[variant])
        axis.set_ylabel(quantity)
        if quantity == "loss":
            axis.set_title(dtype, fontsize=10)
        else:
            axis.set_yscale("log")
            largest = max(differences(curves[REFERENCE], curves[OURS]))
            axis.set_xlabel(f"step; largest difference of ours {largest:.2g}")

    dtypes = list(dict.fromkeys(curve.dtype for curve in curves))
    panels = {
        (quantity, dtype): {curve.variant: curve for curve in curves if curve.dtype == dtype}
        for quantity in ("loss", "difference from masked autograd")
        for dtype in dtypes
    }
    caption = (
        "Losses of a small network on digits, with our layers and with masked autograd, and differences from it: of "
        "ours, and of masked autograd itself with another order of summation."
    )
    return [Figure("curve", caption, draw_panels(panels, draw, 5.0, 2.8, columns=len(dtypes)))] if curves else []


def draw_figures(rows: Sequence[Row], curves: Sequence[Curve]) -> list[Figure]:
    """Draw all figures that rows and curves allow."""
    return [*layer_speedups(rows), *step_times(rows), *step_memory(rows), *loss_curves(curves)]
