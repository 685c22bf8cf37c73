"""The report of training: tables for the screen and the files, from rows and curves alone."""

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from benches.report import Text, machine_table, number, save, time_text
from benches.rows import Row
from benches.summary import layer_rows
from benches.tables import BAD, GOOD, Table
from benches.training import curve, summary
from benches.training.parts import Parts
from benches.training.plots import draw, label
from benches.training.summary import BASES, OURS, REFERENCE

MIB = 2**20
TEXT = Text(
    "Training with switches: study of bap_kernels",
    (
        "Gradients come first: the result and every gradient of a single convolution are compared with autograd of "
        "F.conv2d(x * s, w) in float64 before it is timed; those of a whole step with the masked network in float64 on "
        "four images, and on the whole batch with the masked network in float32. A wrong one stops the study.",
        "All variants of a case are timed in interleaved rounds, each in another order. Times are medians, and "
        "speed-ups are ratios of the medians of one run: above 1 is faster.",
        "masked autograd: F.conv2d(x * s, w), differentiated by PyTorch. dense: F.conv2d(x, w) without switches. "
        "naive: F.conv2d(x.index_select(1, on), w.index_select(1, on)); it gives switches no gradient at all, so those "
        "that are off can never come back: it is no way to train them, and stands here as a measure only. ours: "
        "switched_conv2d, and for networks the layers that switch_ puts in.",
        "frozen: convolution weights get no gradient. trained: they do. Input and switches get one in both.",
        "Single layers: every convolution of ResNet-50 at 224 (batch 8) and ResNet-26 at 64 (batch 32) with at least "
        "64 input channels; switches at random with a fixed seed per case, exactly density x channels on. The output "
        "gradient is random without zeros. Inputs come from a pool larger than the last-level cache.",
        "Whole steps: ResNet-26 on photographs, batch 32, one domain, switches in every convolution but the stem; SGD "
        "with momentum over switches, batch norm, classifier and, if trained, weights. A filter whose only reader is "
        "off there gets an output gradient of zeros, which the kernels find and skip.",
        "kept: bytes of distinct tensors that autograd saves in the forward, parameters apart.",
        "peak: most memory that a forward with backward takes at once (for steps: two steps, from the first on). It is "
        "the high-water mark of the resident set of a separate process, less what was resident before, with malloc "
        "returning freed blocks at once; scratch memory of every library counts. Single layers are measured after a "
        "first run, whole steps in a fresh process each. On a GPU it is that of PyTorch's allocator.",
        "On a GPU (--device cuda) times are between CUDA events with the L2 cache flushed before each run, in float32 "
        "with TF32 off, and ours goes through PyTorch's own operators unless a backend is named (cuda, triton).",
        "The curve trains a small network for 200 steps with the package's layers and with masked autograd, from the "
        "same weights on the same batches. Rounding errors grow from step to step and turn switches, so that no two "
        "float32 runs that round differently stay together: how soon and how far is measured on masked autograd, run "
        "again in channels_last and with the samples of each batch reversed.",
    ),
)


def targets_table(rows: Sequence[Row]) -> Table:
    """Targets beside the figures."""
    lines = [
        [
            verdict.title,
            verdict.setting.layout,
            verdict.setting.mode,
            f"{verdict.setting.density:g}",
            str(verdict.count),
            f"≤ {verdict.wanted:.2f}" if summary.MEMORY in verdict.title else number(verdict.wanted),
            number(verdict.figure),
            GOOD if verdict.met else BAD,
        ]
        for verdict in summary.verdicts(rows)
    ]
    note = "Geometric means over the layers. Of memory, the largest share of any case."
    columns = ["", "layout", "weights", "d", "cases", "wanted", "ours", "verdict"]
    return Table("Targets", columns, lines, note, left=3)


def means_table(rows: Sequence[Row]) -> Table:
    """Single layers: speed-ups, their parts and memory."""
    rows = layer_rows(rows)
    lines = []
    for setting, variant in product(summary.settings(rows), summary.backends(rows)):
        over = [summary.speedup(rows, setting, variant, base) for base in BASES]
        parts = [
            summary.ratios(rows, setting, variant, REFERENCE, lambda row: row.forward_s),
            summary.ratios(rows, setting, variant, REFERENCE, lambda row: row.backward_s),
        ]
        kept = summary.ratios(rows, setting, REFERENCE, variant, lambda row: row.saved_bytes)
        peak = summary.peak_share(rows, setting, variant)
        lines.append(
            [
                setting.layout,
                setting.mode,
                f"{setting.density:g}",
                label(variant),
                str(max((mean.count for mean in over if mean), default=0)),
                *(f"{mean.value:.2f} ({mean.smallest:.2f})" if mean else "–" for mean in over),
                *(number(mean.value if mean else None) for mean in parts),
                *(f"{mean.value:.2f} ({mean.largest:.2f})" if mean else "–" for mean in (kept, peak)),
            ]
        )
    note = (
        "Speed-up of forward and backward, geometric mean, the worst layer in brackets. Naive gives switches no "
        "gradient. Kept and peak: bytes as a share of masked autograd's, the largest in brackets."
    )
    columns = [
        "layout",
        "weights",
        "d",
        "",
        "layers",
        "over masked",
        "over dense",
        "over naive",
        "fwd",
        "bwd",
        "kept",
        "peak",
    ]
    return Table("Single layers", columns, lines, note, left=2)


def mebibytes(count: int | None) -> str:
    """Text of a number of bytes."""
    return number(count / MIB if count is not None else None, 1)


def steps_table(rows: Sequence[Row]) -> Table:
    """Whole steps."""
    lines = [
        [
            row.layout,
            row.mode,
            f"{row.density:g}",
            label(row.variant).split(" (")[0],
            time_text(row.p50_s),
            *(
                time_text(part) if part is not None else "–"
                for part in (row.forward_s, row.backward_s, row.optimiser_s)
            ),
            number(row.vs_masked),
            number(row.vs_dense),
            number(row.vs_naive),
            mebibytes(row.saved_bytes),
            mebibytes(row.peak_bytes),
        ]
        for setting in summary.settings(summary.step_rows(rows))
        for row in summary.step_rows(rows)
        if summary.setting_of(row) == setting
    ]
    batch = max((row.batch for row in summary.step_rows(rows)), default=0)
    note = f"ResNet-26 at 64x64, batch {batch}. Naive trains no switches. Kept and peak in MiB."
    columns = ["layout", "weights", "d", "", "step", "forward", "backward", "SGD"]
    over = ["over masked", "over dense", "over naive"]
    return Table("Whole steps", [*columns, *over, "kept", "peak"], lines, note, left=2)


def parts_table(found: Sequence[Parts]) -> Table:
    """Where the time of whole steps goes."""
    lines = []
    for one in sorted(found, key=lambda p: (p.layout, p.mode, -p.density)):
        for variant, seconds in one.seconds.items():
            ratios = [number(one.speedup), number(one.bound)] if variant == OURS else ["", ""]
            times = [f"{1e3 * value:.0f}" for value in (*seconds.values(), sum(seconds.values()))]
            lines.append([one.layout, one.mode, f"{one.density:g}", label(variant), *times, *ratios])
    names = [f"{part} [ms]" for part in (found[0].seconds[OURS] if found else ())]
    note = (
        "Own time of the operators of a profiled step. Bound: the speed-up if masked autograd's convolutions shrank "
        "exactly with their multiply-adds, and the rest took what it takes in ours."
    )
    columns = ["layout", "weights", "d", "", *names, "all [ms]", "over masked", "bound"]
    return Table("Where the time of a step goes", columns, lines, note, left=3)


def curve_table(curves: Sequence[curve.Curve]) -> Table:
    """How far the losses lie apart."""
    compared = curve.compare(curves)
    lines = [
        [
            one.dtype,
            label(one.variant),
            f"{one.early:.1e}",
            f"{one.largest:.1e}",
            *("never" if at is None else str(at) for at in (one.small_at, one.large_at)),
            f"{one.switches} of {one.all_switches}",
            f"{one.first:.3f}",
            f"{one.last:.3f}",
            f"{one.density:.2f}",
        ]
        for one in compared
    ]
    verdicts = [curve.verdict(compared, dtype) for dtype in dict.fromkeys(one.dtype for one in compared)]
    note = " ".join(
        [
            "Against masked autograd: ours, and masked autograd itself with other rounding (the same sums in another "
            "order). Steps are the first with that difference of the loss. Switches: how many differ after the last "
            "step.",
            *filter(None, verdicts),
        ]
    )
    columns = [
        "dtype",
        "",
        f"largest in {curve.EARLY} steps",
        "largest in all",
        f"{curve.SMALL:g} at step",
        f"{curve.LARGE:g} at step",
        "switches",
        "first loss",
        "last",
        "density",
    ]
    return Table("Loss curves: differences", columns, lines, note, left=2)


def cases_table(rows: Sequence[Row]) -> Table:
    """Every single layer with the time of each variant."""
    cells: dict[str, dict[str, Row]] = {}
    for row in layer_rows(rows):
        cells.setdefault(row.cell, {})[row.variant] = row
    variants = list(dict.fromkeys(row.variant for row in layer_rows(rows)))
    lines = []
    for cell, found in cells.items():
        mine = found.get(OURS)
        peaks = [mebibytes(found[variant].peak_bytes) if variant in found else "–" for variant in (REFERENCE, OURS)]
        lines.append(
            [
                cell,
                *(f"{found[variant].p50_s * 1e3:.2f}" if variant in found else "–" for variant in variants),
                number(mine.vs_masked if mine else None),
                *peaks,
                f"{mine.max_error:.0e}" if mine else "–",
            ]
        )
    columns = [
        "case",
        *(f"{label(variant)} [ms]" for variant in variants),
        "over masked",
        "masked [MiB]",
        "ours [MiB]",
        "error",
    ]
    note = (
        "Medians of forward and backward. MiB: peaks. Error: of any gradient of ours, as a share of its largest value."
    )
    return Table("Every case", columns, lines, note, screen=False)


def write(
    folder: Path,
    header: Mapping[str, Any],
    rows: Sequence[Row],
    curves: Sequence[curve.Curve],
    parts: Sequence[Parts] = (),
) -> list[Table]:
    """Write all files of the report, and return the tables."""
    made = [targets_table(rows), means_table(rows), steps_table(rows), parts_table(parts), curve_table(curves)]
    made = [table for table in made if table.rows] + [machine_table(header, rows), cases_table(rows)]
    save(folder, header, rows, made, draw(rows, curves), TEXT)
    return made
