"""The figures of the report, drawn from the rows."""

import io
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from benches.cases import CASES, LISTS, has_out_lists, is_ragged
from benches.rows import Row
from benches.summary import Setting, geomean, layer_rows, network_rows, setting_of

# One colour and marker per variant in all figures: strong for our backends, muted for baselines.
STYLES: dict[str, dict[str, Any]] = {
    "dense": {"color": "#4d4d4d", "marker": "s", "linestyle": "--"},
    "masked": {"color": "#a6761d", "marker": "v", "linestyle": "--"},
    "naive": {"color": "#e7298a", "marker": "^", "linestyle": ":"},
    "gather_conv": {"color": "#7570b3", "marker": "D", "linestyle": ":"},
    "oracle": {"color": "#1b9e77", "marker": "P", "linestyle": "-."},
    "aten": {"color": "#80b1d3", "marker": "x", "linestyle": "-"},
    "native": {"color": "#e66101", "marker": "o", "linestyle": "-"},
    "auto": {"color": "#1f4fd8", "marker": "*", "linestyle": "-"},
    "planned": {"color": "#7b3294", "marker": "D", "linestyle": "-"},
    "ordered": {"color": "#c2a5cf", "marker": "D", "linestyle": "-."},
    "pruned": {"color": "#8c8c8c", "marker": "v", "linestyle": "--"},
    "compiled": {"color": "#404040", "marker": "^", "linestyle": "--"},
    "compiled_dense": {"color": "#bdbdbd", "marker": "s", "linestyle": "--"},
    "onnxruntime": {"color": "#1b7f79", "marker": "X", "linestyle": "--"},
    "openvino": {"color": "#c51b7d", "marker": "<", "linestyle": "--"},
    "triton": {"color": "#66a61e", "marker": "h", "linestyle": "-"},
    "cuda": {"color": "#d95f02", "marker": "p", "linestyle": "-"},
}
LABELS = {
    "gather_conv": "gather + conv",
    "compiled_dense": "dense compiled",
    "ordered": "planned, ordered",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
}
# Layers with a panel of their own: 1x1 and 3x3, from early to late in both networks.
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

_Key = TypeVar("_Key", bound=Hashable)


@dataclass(frozen=True)
class Figure:
    """A figure: file name without suffix, caption and PNG."""

    name: str
    caption: str
    png: bytes


def label(variant: str) -> str:
    """Return the name of a variant in legends and tables."""
    return LABELS.get(variant, variant)


def setting_title(setting: Setting, density: bool = False) -> str:
    """Return the title of a panel."""
    kind = "both lists" if has_out_lists(setting.lists) else "in-list"
    kind = f"ragged {kind}" if is_ragged(setting.lists) else kind
    suffix = f", density {setting.density:g}" if density else ""
    return f"{setting.layout}, {kind}, batch {setting.batch}{suffix}"


def draw_panels(
    groups: Mapping[_Key, Any],
    draw: Callable[[Any, _Key, Any], None],
    width: float,
    height: float,
    columns: int = 100,
    legend_columns: int = 9,
) -> bytes:
    """Draw one panel for each group, with one legend for all; return the PNG.

    Args:
        groups: Content of the panels.
        draw: Called with the axes, the key and the content of each group.
        width: Of a panel, in inches.
        height: Of a panel, in inches.
        columns: Panels per row at most.
        legend_columns: Entries per row of the legend at most.
    """
    # Without pyplot, which has global state and may ask for a display.
    from matplotlib.figure import Figure as Canvas

    columns = min(columns, len(groups))
    lines = -(-len(groups) // columns)
    canvas = Canvas(figsize=(width * columns, height * lines), layout="constrained")
    axes = list(canvas.subplots(lines, columns, squeeze=False).flat)
    handles: dict[str, Any] = {}
    for axis, (key, content) in zip(axes, groups.items(), strict=False):
        axis.grid(True, which="major", color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        draw(axis, key, content)
        handles.update(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    for axis in axes[len(groups) :]:
        axis.set_visible(False)
    ncols = min(legend_columns, len(handles))
    canvas.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=ncols, frameon=False)
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def group(rows: Iterable[Row], key: Callable[[Row], _Key]) -> dict[_Key, list[Row]]:
    """Return the rows by key, in the order of their first row."""
    groups: dict[_Key, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _by_panel(rows: Sequence[Row]) -> dict[Setting, list[Row]]:
    """Rows by setting without its density."""
    ordered = sorted(rows, key=lambda row: (row.layout, row.batch, LISTS.index(row.lists)))
    return group(ordered, lambda row: replace(setting_of(row), density=0.0))


def variants_of(rows: Iterable[Row]) -> list[str]:
    """Return the variants of the rows, in the order of the legend."""
    present = {row.variant for row in rows}
    return [variant for variant in STYLES if variant in present]


def density_axis(axis: Any, densities: Sequence[float]) -> None:
    """Mark the densities on the x axis."""
    axis.set_xticks(sorted(densities), [f"{density:g}" for density in sorted(densities)])
    axis.set_xlim(min(densities) - 0.06, max(densities) + 0.06)
    axis.set_xlabel("density (kept / all channels)")


def _time_axis(axis: Any, text: str) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_ylabel(text)


def mean_times(rows: Sequence[Row]) -> list[Figure]:
    """Time relative to dense against density, geometric mean over the cases: one line per variant."""

    def draw(axis: Any, panel: Setting, rows: list[Row]) -> None:
        densities = sorted({row.density for row in rows})
        for variant in variants_of(rows):
            by_density = group((row for row in rows if row.variant == variant), lambda row: row.density)
            points = sorted((d, geomean(1 / (row.vs_dense or 1.0) for row in of_d)) for d, of_d in by_density.items())
            axis.plot(*zip(*points, strict=True), label=label(variant), markersize=6, linewidth=1.6, **STYLES[variant])
        work = [density ** (2 if has_out_lists(panel.lists) else 1) for density in densities]
        axis.plot(densities, work, color="#999999", linewidth=5, alpha=0.35, label="share of the work")
        axis.set_title(setting_title(panel), fontsize=10)
        density_axis(axis, densities)
        _time_axis(axis, "time / time of dense")

    panels = _by_panel([row for row in layer_rows(rows) if row.vs_dense])
    caption = (
        "Time against density, relative to the dense convolution of the same run "
        "(geometric mean over the layers; lower is faster)."
    )
    return [Figure("time_mean", caption, draw_panels(panels, draw, 4.6, 4.0, columns=3))] if panels else []


def layer_times(rows: Sequence[Row]) -> list[Figure]:
    """Median time against density of single layers, with the 20th and 80th percentile; one figure per setting."""

    def draw(axis: Any, case: str, rows: list[Row]) -> None:
        for variant in variants_of(rows):
            line = sorted((row for row in rows if row.variant == variant), key=lambda row: row.density)
            medians = [row.p50_s * 1e3 for row in line]
            errors = [[(row.p50_s - row.p20_s) * 1e3 for row in line], [(row.p80_s - row.p50_s) * 1e3 for row in line]]
            sizes = {"markersize": 5, "linewidth": 1.4, "elinewidth": 0.7}
            densities = [row.density for row in line]
            axis.errorbar(densities, medians, errors, label=label(variant), **sizes, **STYLES[variant])
        axis.set_title(f"{rows[0].network} {case}", fontsize=9)
        density_axis(axis, sorted({row.density for row in rows}))
        _time_axis(axis, "time per call [ms]")

    figures = []
    for panel, of_panel in _by_panel(layer_rows(rows)).items():
        by_case = group(of_panel, lambda row: row.case)
        if shown := {case: by_case[case] for case in SHOWN if case in by_case}:
            name = f"time_{panel.layout}_{panel.lists}_b{panel.batch}"
            title = f"Time against density for single layers: {setting_title(panel)}."
            caption = f"{title} Median with 20th and 80th percentile."
            figures.append(Figure(name, caption, draw_panels(shown, draw, 3.6, 3.2, columns=4)))
    return figures


def roofline_shares(rows: Sequence[Row]) -> list[Figure]:
    """% of roofline for every case, one figure per setting at density 0.5 (or the nearest that was timed)."""
    figures = []
    for panel, of_panel in _by_panel([row for row in layer_rows(rows) if row.roofline_share]).items():
        density = min({row.density for row in of_panel}, key=lambda d: abs(d - 0.5))
        by_name = group((r for r in of_panel if r.density == density), lambda row: f"{row.network} {row.case}")
        names = [name for case in reversed(CASES) if (name := f"{case.network} {case.shape}") in by_name]

        def draw(axis: Any, setting: Setting, rows: list[Row], names: list[str] = names) -> None:
            for variant in variants_of(rows):
                of_variant = [row for row in rows if row.variant == variant]
                shares = [100 * (row.roofline_share or 0.0) for row in of_variant]
                heights = [names.index(f"{row.network} {row.case}") for row in of_variant]
                style = {key: value for key, value in STYLES[variant].items() if key != "linestyle"}
                size = 70 if variant in ("native", "auto") else 28
                axis.scatter(shares, heights, label=label(variant), s=size, alpha=0.85, **style)
            axis.axvline(100.0, color="#999999", linewidth=4, alpha=0.35)
            axis.set_yticks(range(len(names)), names, fontsize=8)
            axis.set_ylim(-0.7, len(names) - 0.3)
            axis.set_xlim(left=0)
            axis.set_xlabel("% of roofline (time that peak FLOP/s and copy bandwidth allow / time)")
            axis.set_title(setting_title(setting, density=True), fontsize=10)

        content = {replace(panel, density=density): [row for of_name in by_name.values() for row in of_name]}
        name = f"roofline_{panel.layout}_{panel.lists}_b{panel.batch}"
        caption = (
            f"% of roofline at density {density:g}: {setting_title(panel)}. "
            "The roofline of dense is that of the full work."
        )
        figures.append(
            Figure(name, caption, draw_panels(content, draw, 8.6, 2.0 + 0.23 * len(names), legend_columns=4))
        )
    return figures


def network_speedups(rows: Sequence[Row]) -> list[Figure]:
    """Speed-up of whole networks over dense against density."""

    def draw(axis: Any, key: tuple[str, str, int, str], rows: list[Row]) -> None:
        densities = sorted({row.density for row in rows})
        variants = variants_of(rows)
        width = 0.8 / len(variants)
        for i, variant in enumerate(variants):
            of_variant = [row for row in rows if row.variant == variant]
            offset = (i - (len(variants) - 1) / 2) * width
            positions = [densities.index(row.density) + offset for row in of_variant]
            speedups = [row.vs_dense for row in of_variant]
            bars = axis.bar(positions, speedups, width * 0.92, color=STYLES[variant]["color"], label=label(variant))
            axis.bar_label(bars, fmt="%.2f", fontsize=6, padding=1)
        axis.axhline(1.0, color="#4d4d4d", linewidth=0.8)
        axis.set_xticks(range(len(densities)), [f"{d:g}" for d in densities])
        axis.set_xlabel("density (kept / all channels)")
        axis.set_ylabel("speed-up over dense")
        axis.set_title("{}, {}, batch {}{}".format(*key), fontsize=10)

    rows = [row for row in network_rows(rows) if row.vs_dense]
    groups = group(rows, lambda row: (row.network, row.layout, row.batch, ", ragged" * is_ragged(row.lists)))
    caption = "Whole networks on photographs, in-lists only: speed-up over dense (higher is faster)."
    return [Figure("networks", caption, draw_panels(groups, draw, 3.6, 3.4, columns=4))] if groups else []


def draw_figures(rows: Sequence[Row]) -> list[Figure]:
    """Draw all figures that the rows allow."""
    return [*mean_times(rows), *network_speedups(rows), *layer_times(rows), *roofline_shares(rows)]
