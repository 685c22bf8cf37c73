"""The report of a study: tables for the screen, ``report.md``, ``report.html`` with embedded plots, JSON and CSV."""

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benches import summary
from benches.cases import is_ragged
from benches.plots import Figure, draw_figures, group, label
from benches.roofline import prediction_table
from benches.rows import Row, write_csv, write_json
from benches.summary import BASES, Setting
from benches.tables import BAD, GOOD, Table


@dataclass(frozen=True)
class Text:
    """Title of a report, and how its figures were measured."""

    title: str
    method: Sequence[str]


METHOD = (
    "Every result is compared with a float64 convolution before it is timed; a wrong one stops the study.",
    "All variants of a case are timed in interleaved rounds, each in another order. Times are medians, and speed-ups "
    "are ratios of the medians of one run: above 1 is faster.",
    "Weights are sliced and packed outside the timing, for all variants.",
    "Inputs are random (never zeros) and rotate through a pool larger than the last-level cache, unless a row says "
    "warm.",
    "Freed memory stays with the process (glibc's malloc), so that no page faults of results are timed.",
    "Lists are random with a fixed seed per case: `in` (in-lists only) and `both` keep exactly density x channels; "
    "`in_ragged` and `both_ragged` draw every channel by itself, and have odd lengths as those of trained networks.",
    "dense: F.conv2d on all channels. masked: dense convolution of the input times the mask (with an out-list the "
    "result is masked too). naive: index_select, then F.conv2d with the sliced weight; loses channels_last on a CPU.",
    "gather + conv: the fastest, per case, of several gathers that keep the memory format, followed by the fastest of "
    "F.conv2d, oneDNN with a prepacked weight and, for 1x1, one matrix product.",
    "oracle: PyTorch's convolution on compact inputs: the better, per case, of both memory formats and of F.conv2d and "
    "oneDNN with a prepacked weight. oracle8: the same with channel counts rounded up to 8; left out where they are "
    "multiples of 8.",
    "Whole networks: planned is bk.plan with the backend auto; pruned is bk.specialize, the physical small network of "
    "the domain in PyTorch's layers, eager; compiled ones ran under torch.compile with frozen weights, for one shape; "
    "ONNX Runtime and OpenVINO ran the pruned one in float32, exported for one shape, with as many threads.",
    "native, auto, aten: the op of the package under that backend, as layers in eval mode call it. auto chooses by "
    "measurements of its own, before the timing.",
    "The roofline of a case is max(FLOP / peak FLOP/s, bytes / copy bandwidth) of the kept work (for dense, of all the "
    "work), with peaks measured on the same threads. Small cases can exceed it if weights stay in the cache.",
    f"Means are geometric, over the convolutions with at least {summary.MIN_MEAN_CHANNELS} input channels.",
)
STUDY = Text("Speed-up study of bap_kernels", METHOD)
# In a table with many columns.
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
    """Format a number; None is a dash."""
    return "–" if value is None else f"{value:.{digits}f}"


def time_text(seconds: float | None) -> str:
    """Format seconds as µs, ms or s with three digits; None is a dash."""
    if seconds is None:
        return "–"
    for unit, scale in (("µs", 1e6), ("ms", 1e3)):
        if seconds * scale < 999.5:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds:.3g} s"


def mebibytes(count: int | None) -> str:
    """Format bytes in MiB; None is a dash."""
    return number(None if count is None else count / 2**20, 1)


def machine_table(header: Mapping[str, Any], rows: Sequence[Row]) -> Table:
    """Machine, versions and peaks."""
    environment, roofline, cache = header["environment"], header["roofline"], header["cache_bytes"] / 2**20
    registers, busy = roofline["register_flop_per_s"], header.get("busy_cores")
    lines = {
        "processor": f"{environment['cpu']}, {header['cores']} cores, last-level cache {cache:.0f} MiB",
        "GPU": environment.get("gpu"),
        "threads": str(environment["threads"]),
        "instruction sets": f"bap_kernels {environment['isa']}, PyTorch {environment['pytorch_isa']}",
        "peak, matrix product": f"{roofline['matmul_flop_per_s'] * 1e-9:.1f} GFLOP/s ({header['dtype']})",
        "peak, registers": f"{registers * 1e-9:.1f} GFLOP/s (float32)" if registers else "not measured",
        "copy bandwidth": f"{roofline['bytes_per_s'] * 1e-9:.1f} GB/s read + written",
        "versions": ", ".join(f"{name} {version}" for name, version in environment["versions"].items()),
        "commit": environment["commit"],
        "system": header["system"],
        "started": header["started"],
        "other work": f"{busy:.1f} cores, before the start" if busy is not None else None,
        "unsteadiness": f"{summary.unsteadiness(rows):.2f} (median of p80 / p20 over all rows)",
        "measured": header.get("coverage"),
    }
    return Table("Machine", ["", ""], [[key, value] for key, value in lines.items() if value], left=2, screen=False)


def short(setting: Setting) -> str:
    """Format a setting without its density."""
    return f"{setting.layout} b{setting.batch}"


def targets_table(rows: Sequence[Row]) -> Table:
    """Targets with the measured speed-ups."""
    variants = summary.reported_variants(rows)
    lines = [
        [
            verdict.target.title,
            short(verdict.setting),
            f"{verdict.setting.density:g}",
            str(verdict.count),
            number(verdict.goal),
            *(number(verdict.speedups.get(variant)) for variant in variants),
            GOOD if verdict.met else BAD,
        ]
        for verdict in summary.verdicts(rows, variants)
    ]
    note = f"{label(variants[-1])} decides. For targets of each layer, the worst layer counts." if variants else ""
    columns = ["speed-up", "setting", "d", "layers", "target", *map(label, variants), "verdict"]
    return Table("Targets", columns, lines, note, left=2)


def means_table(rows: Sequence[Row]) -> Table:
    """Geometric means over every base, worst case in brackets."""
    variants = summary.reported_variants(rows)
    means = {(mean.setting, mean.variant, mean.base): mean for mean in summary.means(rows, variants)}
    lines = []
    for setting in summary.settings(summary.layer_rows(rows)):
        for variant in variants:
            of_variant = [means.get((setting, variant, base)) for base in BASES]
            cells = [f"{mean.geomean:.2f} ({mean.worst:.2f})" if mean else "–" for mean in of_variant]
            count = max((mean.count for mean in of_variant if mean), default=0)
            lines.append([short(setting), setting.lists, f"{setting.density:g}", str(count), label(variant), *cells])
    note = "Geometric mean over the layers of the speed-up over each variant, the worst layer in brackets."
    columns = ["setting", "lists", "d", "layers", "", *map(label, BASES)]
    return Table("Speed-up of single layers", columns, lines, note, left=2)


def losses_table(rows: Sequence[Row]) -> Table:
    """Cases in which auto is slower than a baseline."""
    auto = [row for row in rows if row.variant == "auto" and row.C_in is not None]
    losses = summary.losses(rows)
    lines = [[loss.cell, loss.candidate, label(loss.base), number(loss.speedup)] for loss in losses]
    bases = ("dense", "gather_conv")
    counts = ", ".join(f"{sum(loss.base == base for loss in losses)} to {label(base)}" for base in bases)
    note = f"Of {len(auto)} cases auto loses {counts} by more than {summary.NOISE:.0%}."
    columns = ["case", "auto chose", "slower than", "speed-up"]
    return Table("Cases in which auto loses", columns, lines, note, left=3, screen_rows=10)


def networks_table(rows: Sequence[Row]) -> Table:
    """Whole networks."""
    rows = summary.network_rows(rows)
    measured = {row.variant for row in rows}
    copies = [name for name in summary.COPIES if name in measured]
    times = {(row.cell, row.variant): row.p50_s for row in rows if row.variant in copies}

    def over_copies(row: Row) -> list[str]:
        of_cell = {copy: times[row.cell, copy] for copy in copies if (row.cell, copy) in times}
        ratios = [of_cell[copy] / row.p50_s if copy in of_cell else None for copy in copies]
        if len(copies) > 1:
            ratios.append(min(of_cell.values()) / row.p50_s if of_cell and row.variant not in copies else None)
        return [number(ratio) for ratio in ratios]

    lines = [
        [
            f"{row.network} b{row.batch}",
            SHORT_LAYOUTS.get(row.layout, row.layout),
            f"{row.density:g} ragged" if is_ragged(row.lists) else f"{row.density:g}",
            label(row.variant),
            time_text(row.p50_s),
            number(row.vs_dense),
            number(row.vs_masked),
            *over_copies(row),
            mebibytes(row.weight_bytes),
            mebibytes(row.peak_bytes),
            f"{row.max_error:.0e}" if row.max_error else "–",
        ]
        for row in rows
    ]
    note = (
        "Photographs, in-lists only, of round counts unless the density says ragged; planned: the whole network "
        "(ordered: with reordered channels), native and auto: "
        "layer by layer. /: speed-up over that variant; compiled is the pruned network, compiled; ONNX Runtime and "
        "OpenVINO run its export. MiB: parameters and packed weights, without copies that compilers and engines make. "
        "Peak: peak MiB of a forward beyond them. Error: of logits, against the masked network in float64."
    )
    over = ["/ dense", "/ masked", *(f"/ {label(copy)}" for copy in copies)]
    over += ["/ fastest copy"] if len(copies) > 1 else []
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
            time_text(row.first_use_s),
            time_text(row.forward_s),
        ]
        for row in rows
        if row.case == summary.DOMAINS
    ]
    note = (
        "After every domain was used. Resident: growth of the process. Weights: parameters, statistics and packed "
        "weights. Switch: to a domain used before. First use: switch to a domain not used before, with its first "
        "forward; target: at most two forwards. pruned: one small network per domain."
    )
    columns = ["network", "domains", "d", "", "resident MiB", "weights MiB", "switch", "first use", "forward"]
    return Table("Several domains", columns, lines, note)


def overhead_table(rows: Sequence[Row]) -> Table:
    """Time of one call."""
    lines = [
        [row.variant, *(f"{seconds * 1e6:.2f}" for seconds in (row.p50_s, row.p20_s, row.p80_s))]
        for row in rows
        if row.network == summary.OVERHEAD
    ]
    note = "One pixel, without autograd, warm. Target: at most 5 µs. conv2d: F.conv2d on the compact tensors."
    return Table("Time of one call", ["call", "p50 [µs]", "p20 [µs]", "p80 [µs]"], lines, note)


def cases_table(rows: Sequence[Row]) -> Table:
    """Every case with the time of each variant and the chosen candidates."""
    rows = [row for row in rows if row.C_in is not None]
    variants = list(dict.fromkeys(row.variant for row in rows))
    lines = []
    for cell, of_cell in group(rows, lambda row: row.cell).items():
        by_variant = {row.variant: row for row in of_cell}
        times = [f"{by_variant[name].p50_s * 1e6:.0f}" if name in by_variant else "–" for name in variants]
        shares = [by_variant[name].roofline_share if name in by_variant else None for name in ("auto", "oracle")]
        chosen = "; ".join(f"{label(row.variant)}: {row.candidate}" for row in of_cell if row.candidate)
        lines.append([cell, *times, *(number(share and 100 * share, 0) for share in shares), chosen])
    columns = [f"{label(variant)} [µs]" for variant in variants]
    columns = ["case", *columns, "auto, % of roofline", "oracle, % of roofline", "chosen"]
    return Table("Every case", columns, lines, "Medians.", screen=False)


def tables(header: Mapping[str, Any], rows: Sequence[Row]) -> list[Table]:
    """All tables that are not empty, in the order of the report."""
    every = [
        targets_table(rows),
        means_table(rows),
        losses_table(rows) if any(row.variant == "auto" and row.C_in is not None for row in rows) else None,
        networks_table(rows),
        domains_table(rows),
        overhead_table(rows),
        machine_table(header, rows),
        prediction_table(header.get("environment", {}).get("gpu"), rows, header["roofline"], header["dtype"]),
        cases_table(rows),
    ]
    return [table for table in every if table and (table.rows or table.title.startswith("Cases"))]


def markdown(tables: Sequence[Table], figures: Sequence[Figure], text: Text = STUDY) -> str:
    """Return ``report.md``; plots are files beside it."""
    method = "## How it was measured\n\n" + "\n".join(f"- {line}" for line in text.method) + "\n"
    images = [f"![{figure.caption}](plots/{figure.name}.png)\n\n{figure.caption}\n" for figure in figures]
    plots = ["## Plots\n", *images] if images else []
    *most, last = [table.markdown() for table in tables]
    return "\n".join([f"# {text.title}\n", *most, method, *plots, last])


def page(tables: Sequence[Table], figures: Sequence[Figure], text: Text = STUDY) -> str:
    """Return ``report.html``, a self-contained file."""
    images = []
    for figure in figures:
        caption, data = html.escape(figure.caption), base64.b64encode(figure.png).decode()
        image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
        images.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")
    method = "".join(f"<li>{html.escape(line)}</li>" for line in text.method)
    shown = [table.html() for table in tables if table.title != "Every case"]
    every = [f"<details><summary>Every case</summary>{t.html()}</details>" for t in tables if t.title == "Every case"]
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{text.title}</title><style>{STYLE}</style>\n"
        f"<h1>{text.title}</h1>\n"
        + "\n".join([*shown, "<h2>Plots</h2>", *images, f"<h2>How it was measured</h2><ul>{method}</ul>", *every])
        + "</html>\n"
    )


def write(folder: Path, header: Mapping[str, Any], rows: Sequence[Row]) -> list[Table]:
    """Write ``results.json``, ``results.csv``, ``report.md``, ``report.html`` and ``plots/``; return the tables."""
    content = tables(header, rows)
    save(folder, header, rows, content, draw_figures(rows), STUDY)
    return content


def save(
    folder: Path,
    header: Mapping[str, Any],
    rows: Sequence[Row],
    tables: Sequence[Table],
    figures: Sequence[Figure],
    text: Text,
) -> None:
    """Write all files of a report."""
    plots = folder / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    for old in plots.glob("*.png"):
        old.unlink()
    for figure in figures:
        (plots / f"{figure.name}.png").write_bytes(figure.png)
    write_json(folder / "results.json", header, rows)
    write_csv(folder / "results.csv", rows)
    (folder / "report.md").write_text(markdown(tables, figures, text))
    (folder / "report.html").write_text(page(tables, figures, text))
