"""The schema of all measurements, and its files: JSON, JSON lines and CSV.

Speed-ups are ratios of medians of one interleaved run: ``vs_dense`` is the p50 of dense over that of this variant.
Values above 1 are faster.
"""

import csv
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from benches.timers import Spread

# Speed-ups are taken over these variants, where the same run timed them.
BASES = ("dense", "masked", "naive", "gather_conv", "oracle", "oracle8")


@dataclass(frozen=True)
class Row:
    """One variant on one cell. Fields that do not apply (to whole networks, to call overhead) are None.

    Args:
        network: ``resnet50`` or another of `benches.network_models.NETWORKS`; ``overhead`` for the time of one call.
        case: Shape in letters; ``network`` for a whole network, ``domains`` for one that serves several domains,
            ``step`` for a whole training step.
        cell: Id shared by the variants of one comparison.
        variant: ``dense``, ``masked``, ``naive``, ``gather_conv``, ``oracle``, ``oracle8``, a backend of the package,
            or for whole networks ``planned``, ``ordered``, ``pruned``, ``compiled``, ``compiled_dense``,
            ``onnxruntime``, ``openvino``.
        candidate: The implementation that a choosing variant (gather_conv, oracle, auto) selected.
        device: ``cpu`` or ``cuda``; the header names the GPU.
        dtype: Element type of input, weight and result.
        layout: ``channels_last`` or ``nchw``, of input and result.
        batch: N.
        density: Share of the channels kept.
        lists: of `benches.cases.LISTS`.
        seed: Seed of the lists.
        threads: Threads that PyTorch and the kernels may use.
        inputs: ``rotated`` (a pool larger than the last-level cache) or ``warm``.
        rounds: Number of samples.
        p20_s: 20th percentile in seconds.
        p50_s: Median in seconds; for ``domains`` of a switch to a domain used before.
        p80_s: 80th percentile in seconds.
        max_error: Largest absolute difference from float64; in training, of a gradient, relative to its largest value
            (for whole steps, to its norm).
        gflop: Useful work, 2 per multiply-add: the kept work, for dense all of it.
        bytes: Input read, weight and result, each once: what is kept, for dense all of it.
        flop_per_s: ``gflop`` over the median.
        roofline_share: Time that the roofline (peak FLOP/s, copy bandwidth) allows for this work, over the median.
        weight_bytes: Bytes of weights and packed weights (whole networks).
        mode: ``inference``; in training ``frozen`` (convolution weights get no gradient) or ``trained``.
        forward_s: Median of the forward alone, in seconds (training).
        backward_s: Median of the backward alone.
        optimiser_s: Median of the optimiser alone (whole steps).
        saved_bytes: Bytes that autograd saves in the forward for the backward, without parameters.
        peak_bytes: Peak memory beyond what was allocated before the forward.
        domains: Number of domains that a network serves.
        first_use_s: Median of a switch to a domain not used before, with its first forward.
        resident_bytes: Growth of the resident set by everything that serves the domains.
    """

    network: str
    case: str
    cell: str
    variant: str
    candidate: str
    device: str
    dtype: str
    layout: str
    batch: int
    density: float
    lists: str
    seed: int
    threads: int
    inputs: str
    rounds: int
    p20_s: float
    p50_s: float
    p80_s: float
    max_error: float
    C_in: int | None = None
    C_out: int | None = None
    H: int | None = None
    W: int | None = None
    kernel: int | None = None
    stride: int | None = None
    K_in: int | None = None
    K_out: int | None = None
    gflop: float | None = None
    bytes: int | None = None
    flop_per_s: float | None = None
    roofline_share: float | None = None
    weight_bytes: int | None = None
    vs_dense: float | None = None
    vs_masked: float | None = None
    vs_naive: float | None = None
    vs_gather_conv: float | None = None
    vs_oracle: float | None = None
    vs_oracle8: float | None = None
    mode: str = "inference"
    forward_s: float | None = None
    backward_s: float | None = None
    optimiser_s: float | None = None
    saved_bytes: int | None = None
    peak_bytes: int | None = None
    domains: int | None = None
    first_use_s: float | None = None
    resident_bytes: int | None = None

    def speedup(self, base: str) -> float | None:
        """Speed-up over ``base``, or None where it was not timed."""
        return getattr(self, f"vs_{base}")

    @property
    def key(self) -> tuple[str, str, str, str, int]:
        """Identity of the measurement: rows with equal keys replace each other."""
        return self.cell, self.variant, self.device, self.dtype, self.threads


NAMES = tuple(field.name for field in fields(Row))
REQUIRED = frozenset(field.name for field in fields(Row) if field.default is MISSING)


def row_of(cell: Any, spread: Spread, flop: float | None = None, /, **fields: Any) -> Row:
    """Return the row of one variant, without speed-ups.

    Args:
        cell: With ``id``, ``batch``, ``density``, ``lists``, ``layout`` and ``seed``.
        spread: Timings.
        flop: Useful work.
        fields: Further fields of `Row`; the defaults are float32 on the CPU, one input and no candidate.
    """
    defaults: dict[str, Any] = {"cell": cell.id, "candidate": "", "device": "cpu", "dtype": "float32", "inputs": "warm"}
    defaults |= {name: getattr(cell, name) for name in ("layout", "batch", "density", "lists", "seed")}
    defaults |= {"p20_s": spread.p20, "p50_s": spread.p50, "p80_s": spread.p80, "rounds": spread.rounds}
    defaults["threads"] = torch.get_num_threads()
    if flop is not None:
        defaults |= {"gflop": flop * 1e-9, "flop_per_s": flop / spread.p50}
    return Row(**(defaults | fields))


def with_ratios(rows: Iterable[Row]) -> list[Row]:
    """Fill in the speed-ups of the rows of one cell."""
    rows = list(rows)
    p50 = {row.variant: row.p50_s for row in rows}
    return [
        replace(row, **{f"vs_{base}": p50[base] / row.p50_s for base in BASES if base in p50})  # type: ignore[arg-type]
        for row in rows
    ]


def from_dict(values: Mapping[str, Any]) -> Row:
    """Read a row back; fields with a default may be missing.

    Raises:
        ValueError: If the fields are not those of the schema.
    """
    if unmatched := (set(values) - set(NAMES)) | (REQUIRED - set(values)):
        raise ValueError(
            f"from_dict(): expected `values` to have the fields of Row, got {sorted(unmatched)} unknown or missing. "
            "Hint: the file has another version of the schema; run the study again."
        )
    return Row(**values)


def write_json(path: Path, header: Mapping[str, Any], rows: Iterable[Row]) -> None:
    """Write ``{"header": ..., "rows": [...]}``."""
    path.write_text(json.dumps({"header": header, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


def read_json(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """Read what `write_json` wrote: (header, rows)."""
    content = json.loads(path.read_text())
    return content["header"], [from_dict(row) for row in content["rows"]]


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    """Write one line per row, empty where a field is None."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, NAMES)
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


class Journal:
    """JSON lines written while a study runs: the header, then rows as they are measured.

    Args:
        path: File to write; an existing one is continued.
        header: First line of a new file.

    Raises:
        ValueError: If the file was written on another machine or by another build (``header["environment"]``).
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path = path
        self.rows: list[Row] = []
        if path.exists():
            lines = path.read_text().splitlines()
            # An interrupted study may leave an incomplete last line: its row is measured again.
            complete = [line for line in lines if line.endswith("}")]
            old = json.loads(complete[0])["header"].get("environment", {}) if complete else {}
            new = header["environment"]
            if old != new:
                changed = [name for name in new if old.get(name) != new[name]]
                raise ValueError(
                    f"Journal(): expected `path` to hold rows of this build and machine, got {path} with another "
                    f"{', '.join(changed)}. Hint: use another --out, or --fresh to start over."
                )
            self._keep(from_dict(json.loads(line)) for line in complete[1:])
            path.write_text("".join(line + "\n" for line in complete))
        else:
            path.write_text(json.dumps({"header": dict(header)}) + "\n")

    def append(self, rows: Iterable[Row]) -> None:
        """Append the rows of one cell in a single write."""
        rows = list(rows)
        if invalid := [row for row in rows if not (math.isfinite(row.p50_s) and row.p50_s > 0)]:
            raise ValueError(
                f"append(): expected `p50_s` to be positive, got {invalid[0].p50_s} for {invalid[0].cell}."
            )
        with self.path.open("a") as file:
            file.write("".join(json.dumps(asdict(row)) + "\n" for row in rows))
        self._keep(rows)

    def _keep(self, rows: Iterable[Row]) -> None:
        # An incomplete cell is measured again as a whole: the last row of each key counts.
        self.rows = list({row.key: row for row in [*self.rows, *rows]}.values())
