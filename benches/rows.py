"""The one schema of every figure, and its three files: JSON, JSON lines and CSV.

Speed-ups are ratios of medians of one interleaved run: ``vs_dense`` is dense's p50 over this variant's; above 1 is
faster.
"""

import csv
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from benches.timers import Spread

# Variants that a row is divided by, where the same run timed them.
BASES = ("dense", "masked", "naive", "best", "oracle", "oracle8")


@dataclass(frozen=True)
class Row:
    """One variant on one cell. Fields that have no meaning for whole networks or for call overhead are None.

    Args:
        network: ``resnet50``, ``resnet26``, ``densenet121`` or ``wrn28_4``; ``overhead`` for the time of one call.
        case: Shape in letters, ``network`` for a whole network, ``domains`` for one that serves several domains,
            ``step`` for a whole step of training.
        cell: Id of what the variants of one comparison share.
        variant: ``dense``, ``masked``, ``naive``, ``best``, ``oracle``, ``oracle8``, a backend of the package, or
            of whole networks ``planned``, ``ordered``, ``pruned``, ``compiled``, ``compiled_dense``.
        candidate: What a variant that chooses has chosen.
        device: ``cpu`` or ``cuda``; the header names the GPU.
        dtype: Element type of input, weight and result.
        layout: ``channels_last`` or ``nchw``: of the input, and of the result.
        batch: N.
        density: Share of the channels kept.
        lists: ``in`` or ``both``.
        seed: Seed of the lists.
        threads: Threads that PyTorch and the kernels may use.
        inputs: ``rotated`` (a pool larger than the last-level cache) or ``warm``.
        rounds: Samples behind the percentiles.
        p20_s: 20th percentile in seconds.
        p50_s: Median in seconds; of ``domains`` the time of a switch to a domain that was used before.
        p80_s: 80th percentile in seconds.
        max_error: Largest absolute difference from float64; in training, of a gradient, as a share of its largest value
            (of its norm for whole steps).
        gflop: Useful work, 2 per multiply-add: the kept work, and for dense all of it.
        bytes: Input read, weight and result, each once: what is kept, and for dense all of it.
        flop_per_s: ``gflop`` over the median.
        roof_share: Time that the roof (peak FLOP/s, copy bandwidth) allows for this work, over the median.
        weight_bytes: Bytes held by weights and packed weights (whole networks).
        mode: ``inference``; in training ``frozen`` (no gradient in convolution weights) or ``trained``.
        forward_s: Median of the forward alone, in seconds (training).
        backward_s: Median of the backward alone.
        optimiser_s: Median of the optimiser alone (whole steps).
        saved_bytes: Bytes that autograd keeps from the forward for the backward, parameters apart.
        peak_bytes: Most memory taken at once beyond what was there before the forward.
        domains: How many a network serves.
        first_use_s: Median of a switch to a domain that was not used before, and its first forward.
        resident_bytes: Growth of the resident set by all that serves the domains.
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
    roof_share: float | None = None
    weight_bytes: int | None = None
    vs_dense: float | None = None
    vs_masked: float | None = None
    vs_naive: float | None = None
    vs_best: float | None = None
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
        """What makes a row the same measurement as another."""
        return self.cell, self.variant, self.device, self.dtype, self.threads


NAMES = tuple(field.name for field in fields(Row))
REQUIRED = frozenset(field.name for field in fields(Row) if field.default is MISSING)


def _kinds() -> dict[str, type]:
    """Type of every field, without its ``| None``."""
    kinds = {}
    for name, hint in typing.get_type_hints(Row).items():
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        kinds[name] = next(option for option in options if option is not type(None))
    return kinds


_KINDS = _kinds()


class Setting(Protocol):
    """What cells of all kinds have."""

    @property
    def id(self) -> str:
        """Name in ids and tables."""

    @property
    def batch(self) -> int:
        """N."""

    @property
    def density(self) -> float:
        """Share of the channels kept."""

    @property
    def lists(self) -> str:
        """``in`` or ``both``."""

    @property
    def layout(self) -> str:
        """``channels_last`` or ``nchw``."""

    @property
    def seed(self) -> int:
        """Seed of the lists."""


def row_of(setting: Setting, spread: Spread, flop: float | None = None, **fields: Any) -> Row:
    """Put one variant's figures together, without the ratios.

    Args:
        setting: What was measured.
        spread: Its timings.
        flop: Useful work.
        fields: The other fields of `Row`; by default float32 on the CPU, one input, and no candidates.
    """
    usual: dict[str, Any] = {"cell": setting.id, "candidate": "", "device": "cpu", "dtype": "float32", "inputs": "warm"}
    if flop is not None:
        usual |= {"gflop": flop * 1e-9, "flop_per_s": flop / spread.p50}
    return Row(
        layout=setting.layout,
        batch=setting.batch,
        density=setting.density,
        lists=setting.lists,
        seed=setting.seed,
        threads=torch.get_num_threads(),
        rounds=spread.rounds,
        p20_s=spread.p20,
        p50_s=spread.p50,
        p80_s=spread.p80,
        **(usual | fields),
    )


def with_ratios(rows: Iterable[Row]) -> list[Row]:
    """Fill in the speed-ups of the rows of one cell."""
    rows = list(rows)
    p50 = {row.variant: row.p50_s for row in rows}
    return [
        replace(row, **{f"vs_{base}": p50[base] / row.p50_s for base in BASES if base in p50})  # type: ignore[arg-type]
        for row in rows
    ]


def from_dict(values: Mapping[str, Any]) -> Row:
    """Read a row back; text (from CSV) is converted by the field's type. Fields with a default may be missing.

    Raises:
        ValueError: If the fields are not those of the schema.
    """
    if odd := (set(values) - set(NAMES)) | (REQUIRED - set(values)):
        raise ValueError(
            f"from_dict(): expected `values` to have the fields of Row, got {sorted(odd)} "
            "on one side only. Hint: the file comes from another version of the schema; run the study again."
        )
    typed: dict[str, Any] = {
        name: None if value is None or (value == "" and name != "candidate") else _KINDS[name](value)
        for name, value in values.items()
    }
    return Row(**typed)


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


def read_csv(path: Path) -> list[Row]:
    """Read what `write_csv` wrote."""
    with path.open(newline="") as file:
        return [from_dict(row) for row in csv.DictReader(file)]


class Journal:
    """JSON lines that grow while a study runs: the header, then rows as they are measured.

    Args:
        path: File to write; an existing one is continued.
        header: Written as the first line of a new file.

    Raises:
        ValueError: If the file's header differs in what makes figures comparable (``header["same"]``).
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path = path
        self.rows: list[Row] = []
        if path.exists():
            lines = path.read_text().splitlines()
            # An interrupted study may leave half a line: it is measured again.
            whole = [line for line in lines if line.endswith("}")]
            old = json.loads(whole[0])["header"] if whole else {}
            if old.get("same") != header["same"]:
                changed = [name for name in header["same"] if old.get("same", {}).get(name) != header["same"][name]]
                raise ValueError(
                    f"Journal(): expected `path` to hold rows of this build and machine, got {path} with another "
                    f"{', '.join(changed)}. Hint: give another --out, or --fresh to start over."
                )
            self._keep(from_dict(json.loads(line)) for line in whole[1:])
            path.write_text("".join(line + "\n" for line in whole))
        else:
            path.write_text(json.dumps({"header": dict(header)}) + "\n")

    @property
    def done(self) -> set[tuple[str, str, str, str, int]]:
        """Keys of the rows that are there already."""
        return {row.key for row in self.rows}

    def append(self, rows: Iterable[Row]) -> None:
        """Add the rows of one cell in one write."""
        rows = list(rows)
        if bad := [row for row in rows if not (math.isfinite(row.p50_s) and row.p50_s > 0)]:
            raise ValueError(f"append(): expected `p50_s` to be positive, got {bad[0].p50_s} for {bad[0].cell}.")
        with self.path.open("a") as file:
            file.write("".join(json.dumps(asdict(row)) + "\n" for row in rows))
        self._keep(rows)

    def _keep(self, rows: Iterable[Row]) -> None:
        # A cell that was cut off half-way is measured again as a whole: its later rows count.
        latest = {row.key: row for row in [*self.rows, *rows]}
        self.rows = list(latest.values())
