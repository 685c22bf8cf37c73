"""The figures of the report, drawn from rows alone."""

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benches.cases import CASES
from benches.rows import Row
from benches.summary import Setting, geomean, layer_rows, network_rows, settings

# One colour and marker per variant in all figures; ours are strong, PyTorch's muted.
STYLES: dict[str, dict[str, Any]] = {
    "dense": {"color": "#4d4d4d", "marker": "s", "linestyle": "--"},
    "masked": {"color": "#a6761d", "marker": "v", "linestyle": "--"},
    "naive": {"color": "#e7298a", "marker": "^", "linestyle": ":"},
    "best": {"color": "#7570b3", "marker": "D", "linestyle": ":"},
    "oracle": {"color": "#1b9e77", "marker": "P", "linestyle": "-."},
    "aten": {"color": "#80b1d3", "marker": "x", "linestyle": "-"},
    "native": {"color": "#e66101", "marker": "o", "linestyle": "-"},
    "auto": {"color": "#1f4fd8", "marker": "*", "linestyle": "-"},
    "planned": {"color": "#7b3294", "marker": "D", "linestyle": "-"},
    "ordered": {"color": "#c2a5cf", "marker": "D", "linestyle": "-."},
    "pruned": {"color": "#8c8c8c", "marker": "v", "linestyle": "--"},
    "compiled": {"color": "#404040", "marker": "^", "linestyle": "--"},
    "compiled_dense": {"color": "#bdbdbd", "marker": "s", "linestyle": "--"},
    "triton": {"color": "#66a61e", "marker": "h", "linestyle": "-"},
    "cuda": {"color": "#d95f02", "marker": "p", "linestyle": "-"},
}
LABELS = {"best": "gather + conv", "compiled_dense": "dense compiled", "ordered": "planned, ordered"}
# Layers shown one by one: both kinds of kernel from early to late in both networks.
SHOWN = (
    "56x56-64-64-k3s1",
    "56x56-256-64-k1s1",
    "28x28-128-512-k1s1",
    "14x14-256-256-k3s1",
    "14x14-1024-256-k1s1",
    "28x28-512-1024-k1s2",
    "7x7-512-2048-k1s1",
    "16x16-128-128-k3s1",
)


@dataclass(frozen=True)
class Figure:
    """A drawn figure: file name without suffix, caption and PNG."""

    name: str
    caption: str
    png: bytes


def label(variant: str) -> str:
    """Return the name of a variant in legends."""
    return LABELS.get(variant, variant)


def setting_title(setting: Setting, density: bool = False) -> str:
    """Return the heading of a panel."""
    kind = "in-list" if setting.lists == "in" else "both lists"
    tail = f", density {setting.density:g}" if density else ""
    return f"{setting.layout}, {kind}, batch {setting.batch}{tail}"


def new_canvas(columns: int, lines: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """Make a figure with panels of one size in inches, without pyplot's global state or a display."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(width * columns, height * lines), layout="constrained")
    axes = canvas.subplots(lines, columns, squeeze=False)
    for axis in axes.flat:
        axis.grid(True, which="major", color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return canvas, list(axes.flat)


def png_of(canvas: Any) -> bytes:
    """Render a figure."""
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def legend(canvas: Any, axes: Sequence[Any], columns: int = 9) -> None:
    """Put one legend for all panels below a figure."""
    found: dict[str, Any] = {}
    for axis in axes:
        found.update(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    canvas.legend(
        found.values(), found.keys(), loc="outside lower center", ncols=min(columns, len(found)), frameon=False
    )


def _panels(rows: Iterable[Row]) -> list[Setting]:
    """Settings without their density."""
    found = dict.fromkeys(Setting(s.layout, s.batch, s.lists, 0.0) for s in settings(rows))
    return list(found)


def _of_panel(rows: Iterable[Row], panel: Setting) -> list[Row]:
    return [row for row in rows if (row.layout, row.batch, row.lists) == (panel.layout, panel.batch, panel.lists)]


def _variants(rows: Iterable[Row]) -> list[str]:
    present = {row.variant for row in rows}
    return [variant for variant in STYLES if variant in present]


def density_axis(axis: Any, densities: Sequence[float]) -> None:
    """Mark the densities on the x axis."""
    axis.set_xticks(sorted(densities), [f"{density:g}" for density in sorted(densities)])
    axis.set_xlim(min(densities) - 0.06, max(densities) + 0.06)
    axis.set_xlabel("density (kept / all channels)")


def _time_axis(axis: Any, text: str, pattern: str) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axis.yaxis.set_major_formatter(StrMethodFormatter(pattern))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_ylabel(text)


def mean_times(rows: Sequence[Row]) -> Figure | None:
    """Time relative to dense against density, geometric mean over the cases: one line per variant."""
    rows = [row for row in layer_rows(rows) if row.vs_dense]
    panels = _panels(rows)
    if not panels:
        return None
    columns = min(3, len(panels))
    canvas, axes = new_canvas(columns, -(-len(panels) // columns), 4.6, 4.0)
    for axis, panel in zip(axes, panels, strict=False):
        mine = _of_panel(rows, panel)
        densities = sorted({row.density for row in mine})
        for variant in _variants(mine):
            shares: dict[float, list[float]] = {}
            for row in mine:
                if row.variant == variant and row.vs_dense:
                    shares.setdefault(row.density, []).append(1 / row.vs_dense)
            points = sorted((density, geomean(values)) for density, values in shares.items())
            axis.plot(*zip(*points, strict=True), label=label(variant), markersize=6, linewidth=1.6, **STYLES[variant])
        power = 1 if panel.lists == "in" else 2
        axis.plot(
            densities,
            [d**power for d in densities],
            color="#999999",
            linewidth=5,
            alpha=0.35,
            label="share of the work",
        )
        axis.set_title(setting_title(panel), fontsize=10)
        density_axis(axis, densities)
        _time_axis(axis, "time / time of dense", "{x:g}")
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    legend(canvas, axes)
    caption = (
        "Time against density, relative to the dense convolution of the same run "
        "(geometric mean over the layers; lower is faster)."
    )
    return Figure("time_mean", caption, png_of(canvas))


def layer_times(rows: Sequence[Row]) -> list[Figure]:
    """Milliseconds against density for some layers: one figure per layout, batch and kind of lists."""
    rows = [row for row in layer_rows(rows) if row.case in SHOWN]
    figures = []
    for panel in _panels(rows):
        mine = _of_panel(rows, panel)
        shown = [case for case in SHOWN if any(row.case == case for row in mine)]
        columns = min(4, len(shown))
        canvas, axes = new_canvas(columns, -(-len(shown) // columns), 3.6, 3.2)
        for axis, case in zip(axes, shown, strict=False):
            of_case = [row for row in mine if row.case == case]
            for variant in _variants(of_case):
                line = sorted((row.density, row) for row in of_case if row.variant == variant)
                densities = [density for density, _ in line]
                middle = [row.p50_s * 1e3 for _, row in line]
                spread = [
                    [max(0.0, m - row.p20_s * 1e3) for m, (_, row) in zip(middle, line, strict=True)],
                    [max(0.0, row.p80_s * 1e3 - m) for m, (_, row) in zip(middle, line, strict=True)],
                ]
                axis.errorbar(
                    densities,
                    middle,
                    spread,
                    label=label(variant),
                    markersize=5,
                    linewidth=1.4,
                    elinewidth=0.7,
                    **STYLES[variant],
                )
            axis.set_title(f"{of_case[0].network} {case}", fontsize=9)
            density_axis(axis, sorted({row.density for row in of_case}))
            _time_axis(axis, "time per call [ms]", "{x:g}")
        for axis in axes[len(shown) :]:
            axis.set_visible(False)
        legend(canvas, axes)
        name = f"time_{panel.layout}_{panel.lists}_b{panel.batch}"
        caption = (
            f"Time against density for single layers: {setting_title(panel)}. Median with 20th and 80th percentile."
        )
        figures.append(Figure(name, caption, png_of(canvas)))
    return figures


def roof_shares(rows: Sequence[Row]) -> list[Figure]:
    """Share of the roof for every case, one figure per setting at density 0.5 (or the nearest that was timed)."""
    rows = [row for row in layer_rows(rows) if row.roof_share]
    figures = []
    for panel in _panels(rows):
        mine = _of_panel(rows, panel)
        density = min({row.density for row in mine}, key=lambda d: abs(d - 0.5))
        mine = [row for row in mine if row.density == density]
        order = [f"{case.network} {case.shape}" for case in CASES]
        names = [name for name in reversed(order) if any(f"{row.network} {row.case}" == name for row in mine)]
        canvas, axes = new_canvas(1, 1, 8.6, 2.0 + 0.23 * len(names))
        for variant in _variants(mine):
            points = [
                (row.roof_share, names.index(f"{row.network} {row.case}")) for row in mine if row.variant == variant
            ]
            style = {key: value for key, value in STYLES[variant].items() if key != "linestyle"}
            size = 70 if variant in ("native", "auto") else 28
            axes[0].scatter(*zip(*points, strict=True), label=label(variant), s=size, alpha=0.85, **style)
        axes[0].axvline(1.0, color="#999999", linewidth=4, alpha=0.35)
        axes[0].set_yticks(range(len(names)), names, fontsize=8)
        axes[0].set_ylim(-0.7, len(names) - 0.3)
        axes[0].set_xlim(left=0)
        axes[0].set_xlabel("share of the roof (time that peak FLOP/s and copy bandwidth allow / time)")
        axes[0].set_title(
            setting_title(Setting(panel.layout, panel.batch, panel.lists, density), density=True), fontsize=10
        )
        legend(canvas, axes, columns=4)
        name = f"roof_{panel.layout}_{panel.lists}_b{panel.batch}"
        caption = (
            f"Share of the roof at density {density:g}: {setting_title(panel)}. "
            "Dense is measured by the roof of the full work."
        )
        figures.append(Figure(name, caption, png_of(canvas)))
    return figures


def network_speedups(rows: Sequence[Row]) -> Figure | None:
    """Speed-up of whole networks over dense against density."""
    rows = [row for row in network_rows(rows) if row.vs_dense]
    groups = list(dict.fromkeys((row.network, row.layout, row.batch) for row in rows))
    if not groups:
        return None
    columns = min(4, len(groups))
    canvas, axes = new_canvas(columns, -(-len(groups) // columns), 3.6, 3.4)
    for axis, group in zip(axes, groups, strict=False):
        mine = [row for row in rows if (row.network, row.layout, row.batch) == group]
        densities = sorted({row.density for row in mine})
        present = _variants(mine)
        width = 0.8 / len(present)
        for i, variant in enumerate(present):
            bars = [
                (j, row.vs_dense)
                for j, d in enumerate(densities)
                for row in mine
                if row.variant == variant and row.density == d
            ]
            places = [j + (i - (len(present) - 1) / 2) * width for j, _ in bars]
            drawn = axis.bar(
                places, [v for _, v in bars], width * 0.92, color=STYLES[variant]["color"], label=label(variant)
            )
            axis.bar_label(drawn, fmt="%.2f", fontsize=6, padding=1)
        axis.axhline(1.0, color="#4d4d4d", linewidth=0.8)
        axis.set_xticks(range(len(densities)), [f"{d:g}" for d in densities])
        axis.set_xlabel("density (kept / all channels)")
        axis.set_ylabel("speed-up over dense")
        axis.set_title(f"{group[0]}, {group[1]}, batch {group[2]}", fontsize=10)
    for axis in axes[len(groups) :]:
        axis.set_visible(False)
    legend(canvas, axes)
    return Figure(
        "networks",
        "Whole networks on photographs, in-lists only: speed-up over dense (higher is faster).",
        png_of(canvas),
    )


def draw(rows: Sequence[Row]) -> list[Figure]:
    """Draw all figures that the rows allow."""
    found = [mean_times(rows), network_speedups(rows), *layer_times(rows), *roof_shares(rows)]
    return [figure for figure in found if figure is not None]
