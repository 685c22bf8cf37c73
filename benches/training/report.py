"""The report of training: tables and files, from rows, curves and profiles."""

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from benches.plots import group
from benches.report import Text, machine_table, mebibytes, number, save, time_text
from benches.rows import Row
from benches.summary import layer_rows
from benches.tables import BAD, GOOD, Table
from benches.training import curve, summary
from benches.training.parts import Parts
from benches.training.plots import draw_figures, label
from benches.training.summary import BASES, OURS, REFERENCE

TEXT = Text(
    "Training with switches: study of bap_kernels",
    (
        "Gradients are checked first: the result and every gradient of a single convolution against autograd of "
        "F.conv2d(x * s, w) in float64; those of a whole step against the masked network, in float64 on four images "
        "and in float32 on the whole batch. A wrong one stops the study.",
        "All variants of a case are timed in interleaved rounds, each in another order. Times are medians, and "
        "speed-ups are ratios of the medians of one run: above 1 is faster.",
        "masked autograd: F.conv2d(x * s, w), differentiated by PyTorch. dense: F.conv2d(x, w) without switches. "
        "naive: F.conv2d(x.index_select(1, on), w.index_select(1, on)); it gives switches no gradient, so it cannot "
        "train them and is only a point of comparison. ours: switched_conv2d; for networks, the layers of switch_.",
        "frozen: convolution weights get no gradient. trained: they do. Input and switches get one in both.",
        "Single layers: every convolution of ResNet-50 at 224 (batch 8) and ResNet-26 at 64 (batch 32) with at least "
        "64 input channels; random switches with a fixed seed per case, exactly density x channels on. The output "
        "gradient is random without zeros. Inputs come from a pool larger than the last-level cache.",
        "Whole steps: ResNet-26 on photographs, batch 32, one domain, switches in every convolution but the stem; SGD "
        "with momentum over switches, batch norm, classifier and, if trained, weights. A filter whose only consumer is "
        "off gets an output gradient of zeros, which the kernels find and skip.",
        "saved: bytes of distinct tensors that autograd saves in the forward, without parameters.",
        "peak: peak memory of a forward with backward (for steps: of the first two steps): the high-water mark of the "
        "resident set of a separate process, less what was resident before, with malloc returning freed blocks at "
        "once; scratch memory of every library counts. Single layers are measured after a first run, whole steps in a "
        "fresh process each. On a GPU it is that of PyTorch's allocator.",
        "On a GPU (--device cuda) times are between CUDA events with the L2 cache flushed before each run, in float32 "
        "with TF32 off, and ours uses PyTorch's own operators unless a backend is named (cuda, triton).",
        "The curve trains a small network for 200 steps with the package's layers and with masked autograd, from the "
        "same weights on the same batches. Rounding errors grow from step to step and flip switches, so that float32 "
        "runs with different rounding diverge: how soon and how far is measured on masked autograd, run again in "
        "channels_last and with the samples of each batch reversed.",
    ),
)


def targets_table(rows: Sequence[Row]) -> Table:
    """Targets with the measured ratios."""
    lines = [
        [
            verdict.title,
            verdict.setting.layout,
            verdict.setting.mode,
            f"{verdict.setting.density:g}",
            str(verdict.count),
            f"≤ {verdict.goal:.2f}" if summary.MEMORY in verdict.title else number(verdict.goal),
            number(verdict.ratio),
            GOOD if verdict.met else BAD,
        ]
        for verdict in summary.verdicts(rows)
    ]
    note = "Geometric means over the layers. For memory, the largest ratio of any case."
    columns = ["", "layout", "weights", "d", "cases", "target", "ours", "verdict"]
    return Table("Targets", columns, lines, note, left=3)


def means_table(rows: Sequence[Row]) -> Table:
    """Single layers: speed-ups, their parts and memory."""
    rows = layer_rows(rows)
    lines = []
    for setting, variant in product(summary.settings(rows), summary.backends(rows)):
        over = [summary.speedup(rows, setting, variant, base) for base in BASES]
        forward = summary.ratios(rows, setting, variant, REFERENCE, lambda row: row.forward_s)
        backward = summary.ratios(rows, setting, variant, REFERENCE, lambda row: row.backward_s)
        saved = summary.ratios(rows, setting, REFERENCE, variant, lambda row: row.saved_bytes)
        peak = summary.peak_ratio(rows, setting, variant)
        lines.append(
            [
                setting.layout,
                setting.mode,
                f"{setting.density:g}",
                label(variant),
                str(max((mean.count for mean in over if mean), default=0)),
                *(f"{mean.value:.2f} ({mean.smallest:.2f})" if mean else "–" for mean in over),
                *(number(mean.value if mean else None) for mean in (forward, backward)),
                *(f"{mean.value:.2f} ({mean.largest:.2f})" if mean else "–" for mean in (saved, peak)),
            ]
        )
    note = (
        "Speed-up of forward and backward, geometric mean, the worst layer in brackets. Naive gives switches no "
        "gradient. Saved and peak: bytes over those of masked autograd, the largest ratio in brackets."
    )
    columns = ["layout", "weights", "d", "", "layers", "over masked", "over dense", "over naive"]
    return Table("Single layers", [*columns, "fwd", "bwd", "saved", "peak"], lines, note, left=2)


def steps_table(rows: Sequence[Row]) -> Table:
    """Whole steps."""
    lines = [
        [
            row.layout,
            row.mode,
            f"{row.density:g}",
            label(row.variant).split(" (")[0],
            time_text(row.p50_s),
            *map(time_text, (row.forward_s, row.backward_s, row.optimiser_s)),
            *map(number, (row.vs_masked, row.vs_dense, row.vs_naive)),
            mebibytes(row.saved_bytes),
            mebibytes(row.peak_bytes),
        ]
        for setting in summary.settings(summary.step_rows(rows))
        for row in summary.step_rows(rows)
        if summary.setting_of(row) == setting
    ]
    batch = max((row.batch for row in summary.step_rows(rows)), default=0)
    note = f"ResNet-26 at 64x64, batch {batch}. Naive trains no switches. Saved and peak in MiB."
    columns = ["layout", "weights", "d", "", "step", "forward", "backward", "SGD"]
    over = ["over masked", "over dense", "over naive"]
    return Table("Whole steps", [*columns, *over, "saved", "peak"], lines, note, left=2)


def parts_table(profiles: Sequence[Parts]) -> Table:
    """Time of whole steps by part."""
    lines = []
    for profile in sorted(profiles, key=lambda p: (p.layout, p.mode, -p.density)):
        for variant, seconds in profile.seconds.items():
            ratios = [number(profile.speedup), number(profile.bound)] if variant == OURS else ["", ""]
            times = [f"{1e3 * value:.0f}" for value in (*seconds.values(), sum(seconds.values()))]
            lines.append([profile.layout, profile.mode, f"{profile.density:g}", label(variant), *times, *ratios])
    names = [f"{part} [ms]" for part in (profiles[0].seconds[OURS] if profiles else ())]
    note = (
        "Own time of the operators of a profiled step. Bound: the speed-up if masked autograd's convolutions shrank "
        "exactly with their multiply-adds, and the rest took as long as in ours."
    )
    columns = ["layout", "weights", "d", "", *names, "all [ms]", "over masked", "bound"]
    return Table("Where the time of a step goes", columns, lines, note, left=3)


def curve_table(curves: Sequence[curve.Curve]) -> Table:
    """Differences of the losses from those of masked autograd."""
    comparisons = curve.compare(curves)
    lines = [
        [
            comparison.dtype,
            label(comparison.variant),
            f"{comparison.early:.1e}",
            f"{comparison.largest:.1e}",
            *("never" if step is None else str(step) for step in (comparison.small_at, comparison.large_at)),
            f"{comparison.switches} of {comparison.all_switches}",
            f"{comparison.first:.3f}",
            f"{comparison.last:.3f}",
            f"{comparison.density:.2f}",
        ]
        for comparison in comparisons
    ]
    verdicts = [curve.verdict(comparisons, dtype) for dtype in dict.fromkeys(c.dtype for c in comparisons)]
    text = (
        "Differences from masked autograd: of ours, and of masked autograd itself with another order of summation. "
        "Steps are the first with that difference of the loss. Switches: how many differ after the last step."
    )
    columns = ["dtype", "", f"largest in {curve.EARLY} steps", "largest in all"]
    columns += [f"{limit:g} at step" for limit in (curve.SMALL, curve.LARGE)]
    columns += ["switches", "first loss", "last", "density"]
    return Table("Loss curves: differences", columns, lines, " ".join([text, *filter(None, verdicts)]), left=2)


def cases_table(rows: Sequence[Row]) -> Table:
    """Every single layer with the time of each variant."""
    rows = layer_rows(rows)
    variants = list(dict.fromkeys(row.variant for row in rows))
    lines = []
    for cell, of_cell in group(rows, lambda row: row.cell).items():
        by_variant = {row.variant: row for row in of_cell}
        ours, masked = by_variant.get(OURS), by_variant.get(REFERENCE)
        times = [f"{by_variant[name].p50_s * 1e3:.2f}" if name in by_variant else "–" for name in variants]
        peaks = [mebibytes(row.peak_bytes if row else None) for row in (masked, ours)]
        lines.append(
            [cell, *times, number(ours.vs_masked if ours else None), *peaks, f"{ours.max_error:.0e}" if ours else "–"]
        )
    columns = ["case", *(f"{label(variant)} [ms]" for variant in variants)]
    columns += ["over masked", "masked [MiB]", "ours [MiB]", "error"]
    note = "Medians of forward and backward. MiB: peaks. Error: of any gradient of ours, relative to its largest value."
    return Table("Every case", columns, lines, note, screen=False)


def write(
    folder: Path,
    header: Mapping[str, Any],
    rows: Sequence[Row],
    curves: Sequence[curve.Curve],
    profiles: Sequence[Parts] = (),
) -> list[Table]:
    """Write all files of the report, and return its tables."""
    tables = [targets_table(rows), means_table(rows), steps_table(rows), parts_table(profiles), curve_table(curves)]
    tables = [table for table in tables if table.rows] + [machine_table(header, rows), cases_table(rows)]
    save(folder, header, rows, tables, draw_figures(rows, curves), TEXT)
    return tables
