"""The figures of the report of training."""

from collections.abc import Callable, Sequence
from typing import Any

from benches.plots import STYLES, Figure, density_axis, legend, new_canvas, png_of
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
PARTS = (("forward", "#1f4fd8"), ("backward", "#80b1d3"), ("SGD", "#4d4d4d"))


def label(variant: str) -> str:
    """Return the name of a variant in legends."""
    return LABELS.get(variant, variant)


def _panels(rows: Sequence[Row]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((setting.layout, setting.mode) for setting in summary.settings(rows)))


def _of_panel(rows: Sequence[Row], panel: tuple[str, str]) -> list[Row]:
    return [row for row in rows if (row.layout, row.mode) == panel]


def layer_speedups(rows: Sequence[Row]) -> Figure | None:
    """Speed-up over masked autograd against density: one line per variant, with the targets."""
    rows = layer_rows(rows)
    panels = _panels(rows)
    if not panels:
        return None
    canvas, axes = new_canvas(len(panels), 1, 3.8, 3.8)
    for axis, panel in zip(axes, panels, strict=True):
        mine = _of_panel(rows, panel)
        densities = sorted({row.density for row in mine})
        for variant in (name for name in STYLES if any(row.variant == name for row in mine)):
            means = [(d, summary.speedup(mine, Setting(*panel, d), variant, REFERENCE)) for d in densities]
            points = (
                [(d, mean.value) for d, mean in means if mean]
                if variant != REFERENCE
                else [(d, 1.0) for d in densities]
            )
            if points:
                axis.plot(
                    *zip(*points, strict=True), label=label(variant), markersize=6, linewidth=1.6, **STYLES[variant]
                )
        wanted = [(d, LAYER_TARGETS[panel[1]][d]) for d in densities if d in LAYER_TARGETS[panel[1]]]
        if wanted:
            axis.plot(*zip(*wanted, strict=True), color="#999999", linewidth=5, alpha=0.35, label="target")
        axis.set_title(f"{panel[0]}, weights {panel[1]}", fontsize=10)
        axis.set_ylabel("speed-up over masked autograd")
        density_axis(axis, densities)
    legend(canvas, axes)
    caption = "Forward and backward of single layers: speed-up over masked autograd (geometric mean; higher is faster)."
    return Figure("layers", caption, png_of(canvas))


def _bars(
    rows: Sequence[Row], unit: str, heights: Callable[[Row], Sequence[tuple[str, float, str]]]
) -> tuple[Any, list[Any]]:
    """Draw stacked bars for every variant and density of the steps, one panel per layout and mode."""
    panels = _panels(rows)
    canvas, axes = new_canvas(len(panels), 1, 3.8, 3.8)
    for axis, panel in zip(axes, panels, strict=True):
        mine = sorted(_of_panel(rows, panel), key=lambda row: -row.density)
        densities = list(dict.fromkeys(row.density for row in mine))
        names = [variant for variant in STYLES if any(row.variant == variant for row in mine)]
        ticks = []
        for row in mine:
            place = densities.index(row.density) * (len(names) + 1) + names.index(row.variant)
            ticks.append((place, f"{label(row.variant).split()[0]} {row.density:g}"))
            bottom = 0.0
            for part, height, colour in heights(row):
                axis.bar(place, height, 0.85, bottom=bottom, color=colour, label=part)
                bottom += height
        axis.set_xticks(*zip(*ticks, strict=True), rotation=60, ha="right", fontsize=8)
        axis.set_title(f"{panel[0]}, weights {panel[1]}", fontsize=10)
        axis.set_ylabel(unit)
    legend(canvas, axes)
    return canvas, axes


def step_times(rows: Sequence[Row]) -> Figure | None:
    """Time of a step, in its parts."""
    rows = [row for row in summary.step_rows(rows) if row.forward_s is not None]
    if not rows:
        return None

    def heights(row: Row) -> list[tuple[str, float, str]]:
        seconds = (row.forward_s, row.backward_s, row.optimiser_s)
        return [(part, (value or 0.0) * 1e3, colour) for (part, colour), value in zip(PARTS, seconds, strict=True)]

    canvas, _ = _bars(rows, "time of a step [ms]", heights)
    return Figure("steps", "Whole steps of ResNet-26: time by part (lower is faster).", png_of(canvas))


def step_memory(rows: Sequence[Row]) -> Figure | None:
    """Memory of a step: what is kept, and the peak beyond it."""
    rows = [row for row in summary.step_rows(rows) if row.peak_bytes and row.saved_bytes is not None]
    if not rows:
        return None

    def heights(row: Row) -> list[tuple[str, float, str]]:
        kept, peak = (row.saved_bytes or 0) / 2**20, (row.peak_bytes or 0) / 2**20
        return [("kept for the backward", kept, "#1b9e77"), ("peak beyond that", max(0.0, peak - kept), "#a6761d")]

    canvas, _ = _bars(rows, "memory of a step [MiB]", heights)
    return Figure("memory", "Whole steps of ResNet-26: memory beyond model and data (lower is less).", png_of(canvas))


def loss_curves(curves: Sequence[Curve]) -> Figure | None:
    """Losses of all variants, and their differences from masked autograd below."""
    if not curves:
        return None
    dtypes = list(dict.fromkeys(curve.dtype for curve in curves))
    canvas, axes = new_canvas(len(dtypes), 2, 5.0, 2.8)
    for i, dtype in enumerate(dtypes):
        above, below = axes[i], axes[len(dtypes) + i]
        mine = {curve.variant: curve for curve in curves if curve.dtype == dtype}
        for variant, curve in mine.items():
            above.plot(curve.losses, label=label(variant), linewidth=1.4, **CURVES[variant])
            apart = differences(mine[REFERENCE], curve)
            # Exact zeros have no place on a logarithmic axis.
            below.plot([i for i, a in enumerate(apart) if a], [a for a in apart if a], linewidth=1.0, **CURVES[variant])
        below.set_yscale("log")
        above.set_title(dtype, fontsize=10)
        above.set_ylabel("loss")
        below.set_ylabel("difference from masked autograd")
        largest = max(differences(mine[REFERENCE], mine[OURS]))
        below.set_xlabel(f"step; largest difference of ours {largest:.2g}")
    legend(canvas, axes)
    caption = (
        "Losses of a small network on digits, with our layers and with masked autograd, and differences from it: of "
        "ours, and of masked autograd itself where only the order of its sums is another."
    )
    return Figure("curve", caption, png_of(canvas))


def draw(rows: Sequence[Row], curves: Sequence[Curve]) -> list[Figure]:
    """Draw all figures that rows and curves allow."""
    found = [layer_speedups(rows), step_times(rows), step_memory(rows), loss_curves(curves)]
    return [figure for figure in found if figure is not None]
