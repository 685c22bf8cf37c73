"""The report of a study: tables for the screen, ``report.md``, ``report.html`` with embedded plots, JSON and CSV."""

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benches import summary
from benches.plots import Figure, draw, label
from benches.roofline import prediction_table
from benches.rows import Row, write_csv, write_json
from benches.summary import BASES, Setting
from benches.tables import BAD, GOOD, Table


@dataclass(frozen=True)
class Text:
    """Heading of a report, and how its figures were measured."""

    title: str
    method: Sequence[str]


METHOD = (
    "Every result is compared with a float64 convolution before it is timed; a wrong one stops the study.",
    "All variants of a case are timed in interleaved rounds, each in another order. Times are medians, and speed-ups "
    "are ratios of the medians of one run: above 1 is faster.",
    "Slicing and packing of weights is outside the timing, for everyone alike.",
    "Inputs are random (never zeros) and taken from a pool larger than the last-level cache, unless a row says warm.",
    "Freed memory stays with the process (glibc's malloc), so that results are not mapped anew at every call.",
    "Lists are random with a fixed seed per case and keep exactly density x channels.",
    "dense: F.conv2d on all channels. masked: the input (and with an out-list the result) times the mask, dense "
    "convolution. naive: index_select, then F.conv2d with the sliced weight; it loses channels_last on a CPU.",
    "gather + conv: the fastest, per case, of several gathers that keep the memory format, followed by the fastest of "
    "F.conv2d, oneDNN with a prepacked weight and, for 1x1, one matrix product.",
    "oracle: PyTorch's convolution on inputs that are compact already: the better, per case, of both memory formats "
    "and of F.conv2d and oneDNN with a prepacked weight. oracle8 is the same with channel counts rounded up to 8, "
    "left out where they are multiples of 8 already.",
    "planned, of whole networks: bk.plan, with the backend of auto. pruned: bk.specialize, the physically small "
    "network of the domain in PyTorch's layers, eager. Compiled ones ran under torch.compile with frozen weights, made "
    "for one shape.",
    "native, auto, aten: the op of the package under that backend, as layers in eval mode call it. auto chooses by "
    "measurements of its own, made before the timing.",
    "The roof of a case is max(FLOP / peak FLOP/s, bytes / copy bandwidth) of the kept work (for dense, of all the "
    "work), with peaks measured on the same threads. Small cases can exceed it where weights stay in the cache.",
    f"Means are geometric, over the convolutions with at least {summary.MIN_MEAN_CHANNELS} input channels.",
)
STUDY = Text("Speed-up study of bap_kernels", METHOD)
# For a table with many columns.
SHORT_LAYOUTS = {"channels_last": "nhwc"}
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#222;max-width:1240px;margin:2em auto;padding:0 1em}
h1{font-size:1.7em}h2{font-size:1.2em;margin-top:2em;border-bottom:1px solid #ddd}
table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}
th,td{padding:.2em .7em;text-align:right;border-bottom:1px solid #eee;white-space:nowrap}
th{background:#f5f5f5;position:sticky;top:0}.l{text-align:left}.met{color:#1a7f37;font-weight:600}
.missed{color:#c62828;font-weight:600}.scroll{overflow-x:auto}figure{margin:1.5em 0}img{max-width:100%}
figcaption{color:#555;font-size:13px}summary{cursor:pointer;font-weight:600}
"""


def number(value: float | None, digits: int = 2) -> str:
    """Text of a figure, a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


def time_text(seconds: float) -> str:
    """Microseconds, milliseconds or seconds, three digits."""
    for unit, scale in (("µs", 1e6), ("ms", 1e3)):
        if seconds * scale < 999.5:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds:.3g} s"


def mebibytes(count: int | None) -> str:
    """Bytes in MiB, a dash where there is no figure."""
    return number(None if count is None else count / 2**20, 1)


def machine_table(header: Mapping[str, Any], rows: Sequence[Row]) -> Table:
    """Machine, versions and peaks."""
    same, roof = header["same"], header["roof"]
    registers = roof["register_flop_per_s"]
    lines = [
        [
            "processor",
            f"{same['cpu']}, {header['cores']} cores, last-level cache {header['cache_bytes'] / 2**20:.0f} MiB",
        ],
        *([["GPU", same["gpu"]]] if "gpu" in same else []),
        ["threads", str(same["threads"])],
        ["instruction sets", f"bap_kernels {same['isa']}, PyTorch {same['pytorch_isa']}"],
        ["peak, matrix product", f"{roof['matmul_flop_per_s'] * 1e-9:.1f} GFLOP/s ({header['dtype']})"],
        ["peak, registers", f"{registers * 1e-9:.1f} GFLOP/s (float32)" if registers else "not measured"],
        ["copy bandwidth", f"{roof['bytes_per_s'] * 1e-9:.1f} GB/s read + written"],
        ["versions", ", ".join(f"{name} {version}" for name, version in same["versions"].items())],
        ["commit", same["commit"]],
        ["system", header["system"]],
        ["started", header["started"]],
        ["steadiness", f"median of p80 / p20 over all rows {summary.unsteadiness(rows):.2f}"],
    ]
    if header.get("coverage"):
        lines.append(["measured", header["coverage"]])
    return Table("Machine", ["", ""], lines, left=2, screen=False)


def short(setting: Setting) -> str:
    """Return a setting without its density, for narrow columns."""
    return f"{setting.layout} b{setting.batch}"


def targets_table(rows: Sequence[Row]) -> Table:
    """Targets beside the figures."""
    variants = summary.subjects(rows)
    lines = []
    for verdict in summary.verdicts(rows, variants):
        figures = [number(verdict.figures.get(variant)) for variant in variants]
        setting = verdict.setting
        lines.append(
            [
                verdict.target.title,
                short(setting),
                f"{setting.density:g}",
                str(verdict.count),
                number(verdict.wanted),
                *figures,
                GOOD if verdict.met else BAD,
            ]
        )
    note = f"{label(variants[-1])} decides. For every layer, the figure is the worst one." if variants else ""
    columns = ["speed-up", "setting", "d", "layers", "wanted", *map(label, variants), "verdict"]
    return Table("Targets", columns, lines, note, left=2)


def means_table(rows: Sequence[Row]) -> Table:
    """Geometric means over every base, worst case in brackets."""
    variants = summary.subjects(rows)
    found = {(mean.setting, mean.variant, mean.base): mean for mean in summary.means(rows, variants)}
    lines = []
    for setting in summary.settings(summary.layer_rows(rows)):
        for variant in variants:
            mine = [found.get((setting, variant, base)) for base in BASES]
            cells = [f"{mean.geomean:.2f} ({mean.worst:.2f})" if mean else "–" for mean in mine]
            count = max((mean.count for mean in mine if mean), default=0)
            lines.append([short(setting), setting.lists, f"{setting.density:g}", str(count), label(variant), *cells])
    note = "Geometric mean over the layers of the speed-up over each variant, the worst layer in brackets."
    columns = ["setting", "lists", "d", "layers", "", *map(label, BASES)]
    return Table("Speed-up of single layers", columns, lines, note, left=2)


def losses_table(rows: Sequence[Row]) -> Table:
    """Cases in which auto loses."""
    auto = [row for row in rows if row.variant == "auto" and row.C_in is not None]
    losses = summary.losses(rows)
    lines = [[loss.cell, loss.candidate, label(loss.base), number(loss.speedup)] for loss in losses]
    counts = ", ".join(f"{sum(loss.base == base for loss in losses)} to {label(base)}" for base in ("dense", "best"))
    note = f"Of {len(auto)} cases auto loses {counts} by more than {summary.NOISE:.0%}."
    return Table(
        "Cases in which auto loses",
        ["case", "auto chose", "slower than", "speed-up"],
        lines,
        note,
        left=3,
        screen_rows=10,
    )


def networks_table(rows: Sequence[Row]) -> Table:
    """Whole networks."""
    copies = ("pruned", "compiled")
    times = {(row.cell, row.variant): row.p50_s for row in summary.network_rows(rows) if row.variant in copies}
    lines = [
        [
            f"{row.network} b{row.batch}",
            SHORT_LAYOUTS.get(row.layout, row.layout),
            f"{row.density:g}",
            label(row.variant),
            time_text(row.p50_s),
            number(row.vs_dense),
            number(row.vs_masked),
            *(number(times[row.cell, copy] / row.p50_s if (row.cell, copy) in times else None) for copy in copies),
            mebibytes(row.weight_bytes),
            mebibytes(row.peak_bytes),
            f"{row.max_error:.0e}" if row.max_error else "–",
        ]
        for row in summary.network_rows(rows)
    ]
    note = (
        "Photographs, in-lists only; planned as a whole network (ordered: with its channels in an order of their own), "
        "native and auto layer by layer. /: speed-up over that variant, compiled being the pruned one. MiB: parameters "
        "and packed copies, without what torch.compile lays out anew. Peak: most MiB that a forward takes besides. "
        "Error: of logits, against float64 of the masked network."
    )
    over = ["/ dense", "/ masked", "/ pruned", "/ compiled"]
    columns = ["network", "layout", "d", "", "time", *over, "MiB", "peak", "error"]
    return Table("Whole networks", columns, lines, note, left=2)


def domains_table(rows: Sequence[Row]) -> Table:
    """Networks that serve several domains."""
    lines = [
        [
            f"{row.network} b{row.batch}",
            str(row.domains),
            f"{row.density:g}",
            label(row.variant),
            mebibytes(row.resident_bytes),
            mebibytes(row.weight_bytes),
            time_text(row.p50_s),
            time_text(row.first_use_s or 0.0),
            time_text(row.forward_s or 0.0),
        ]
        for row in rows
        if row.case == summary.DOMAINS
    ]
    note = (
        "All domains used once. Resident: growth of the process. Weights: parameters, statistics and packed copies. "
        "Switch: to a domain used before. First use: a switch to a domain not used before, with its first forward; "
        "wanted: at most two forwards. pruned: one small network for each domain."
    )
    columns = ["network", "domains", "d", "", "resident MiB", "weights MiB", "switch", "first use", "forward"]
    return Table("Several domains", columns, lines, note)


def overhead_table(rows: Sequence[Row]) -> Table:
    """Time of one call."""
    mine = summary.overhead_rows(rows)
    lines = [
        [row.variant, f"{row.p50_s * 1e6:.2f}", f"{row.p20_s * 1e6:.2f}", f"{row.p80_s * 1e6:.2f}"] for row in mine
    ]
    note = "One pixel, without autograd, warm. Wanted: at most 5 µs. conv2d: F.conv2d on the compact tensors."
    return Table("Time of one call", ["call", "p50 [µs]", "p20 [µs]", "p80 [µs]"], lines, note)


def cases_table(rows: Sequence[Row]) -> Table:
    """Every case with the time of each variant and what was chosen."""
    rows = [row for row in rows if row.C_in is not None]
    variants = list(dict.fromkeys(row.variant for row in rows))
    cells: dict[str, dict[str, Row]] = {}
    for row in rows:
        cells.setdefault(row.cell, {})[row.variant] = row
    lines = []
    for cell, found in cells.items():
        chosen = [f"{label(variant)}: {row.candidate}" for variant, row in found.items() if row.candidate]
        times = [f"{found[variant].p50_s * 1e6:.0f}" if variant in found else "–" for variant in variants]
        shares = [number(found[variant].roof_share) if variant in found else "–" for variant in ("auto", "oracle")]
        lines.append([cell, *times, *shares, "; ".join(chosen)])
    columns = ["case", *(f"{label(variant)} [µs]" for variant in variants), "auto/roof", "oracle/roof", "chosen"]
    return Table("Every case", columns, lines, "Medians.", screen=False)


def tables(header: Mapping[str, Any], rows: Sequence[Row]) -> list[Table]:
    """All tables that have something to say, in the order of the report."""
    found = [
        targets_table(rows),
        means_table(rows),
        losses_table(rows) if any(row.variant == "auto" and row.C_in is not None for row in rows) else None,
        networks_table(rows),
        domains_table(rows),
        overhead_table(rows),
        machine_table(header, rows),
        prediction_table(header.get("same", {}).get("gpu"), rows, header["roof"], header["dtype"]),
        cases_table(rows),
    ]
    return [table for table in found if table and (table.rows or table.title.startswith("Cases"))]


def markdown(made: Sequence[Table], figures: Sequence[Figure], text: Text = STUDY) -> str:
    """Make ``report.md``; plots are files beside it."""
    method = "## How it was measured\n\n" + "\n".join(f"- {line}" for line in text.method) + "\n"
    images = [f"![{figure.caption}](plots/{figure.name}.png)\n\n{figure.caption}\n" for figure in figures]
    plots = ["## Plots\n", *images] if images else []
    *most, last = [table.markdown() for table in made]
    return "\n".join([f"# {text.title}\n", *most, method, *plots, last])


def page(made: Sequence[Table], figures: Sequence[Figure], text: Text = STUDY) -> str:
    """Make ``report.html``: one file that needs nothing else."""
    images = []
    for figure in figures:
        caption, data = html.escape(figure.caption), base64.b64encode(figure.png).decode()
        image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
        images.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")
    method = "".join(f"<li>{html.escape(line)}</li>" for line in text.method)
    shown = [table.html() for table in made if table.title != "Every case"]
    every = [f"<details><summary>Every case</summary>{t.html()}</details>" for t in made if t.title == "Every case"]
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{text.title}</title><style>{STYLE}</style>\n"
        f"<h1>{text.title}</h1>\n"
        + "\n".join([*shown, "<h2>Plots</h2>", *images, f"<h2>How it was measured</h2><ul>{method}</ul>", *every])
        + "</html>\n"
    )


def write(folder: Path, header: Mapping[str, Any], rows: Sequence[Row]) -> list[Table]:
    """Write ``results.json``, ``results.csv``, ``report.md``, ``report.html`` and ``plots/``; return the tables."""
    made = tables(header, rows)
    save(folder, header, rows, made, draw(rows), STUDY)
    return made


def save(
    folder: Path,
    header: Mapping[str, Any],
    rows: Sequence[Row],
    made: Sequence[Table],
    figures: Sequence[Figure],
    text: Text,
) -> None:
    """Write a report's files: figures and tables in all their forms."""
    plots = folder / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    for old in plots.glob("*.png"):
        old.unlink()
    for figure in figures:
        (plots / f"{figure.name}.png").write_bytes(figure.png)
    write_json(folder / "results.json", header, rows)
    write_csv(folder / "results.csv", rows)
    (folder / "report.md").write_text(markdown(made, figures, text))
    (folder / "report.html").write_text(page(made, figures, text))
