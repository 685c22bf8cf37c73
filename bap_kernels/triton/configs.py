"""Configurations of the kernels: tiles, warps and stages by kernel, architecture, products and shape, as data.

A table gives the same kernels in every run and asks no driver at import. What tuning has measured here, on request,
goes first.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

__all__ = [
    "ARCHITECTURES",
    "TABLE",
    "Architecture",
    "Config",
    "Problem",
    "architecture",
    "behind_a_list",
    "choose",
    "chunks",
    "from_table",
    "overridden",
    "overriding",
    "tuned",
    "within_registers",
]


@dataclass(frozen=True)
class Config:
    """Tile (rows, columns, depth), warps, stages of the pipeline, and rows of tiles that run side by side."""

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int
    group_m: int = 8


@dataclass(frozen=True)
class Architecture:
    """What the choice of a tile depends on.

    Args:
        capability: compute capability without its point, as 90.
        table: whose configurations it takes.
        sm_count: streaming multiprocessors of the usual board.
        shared_bytes: shared memory that one block may use.
    """

    capability: int
    table: str
    sm_count: int
    shared_bytes: int


ARCHITECTURES = {
    each.capability: each
    for each in (
        Architecture(80, "sm_80", 108, 163 * 1024),
        Architecture(86, "small", 82, 99 * 1024),
        Architecture(89, "small", 128, 99 * 1024),
        Architecture(90, "sm_90", 132, 227 * 1024),
        Architecture(100, "sm_100", 148, 227 * 1024),
        Architecture(103, "sm_100", 148, 227 * 1024),
        Architecture(120, "small", 170, 99 * 1024),
    )
}

_16_BIT_SM_80 = {
    "large": Config(128, 128, 32, 8, 4),
    "medium": Config(64, 128, 64, 4, 4),
    "small": Config(64, 64, 64, 4, 4),
    "narrow": Config(128, 64, 64, 4, 4),
    "thin": Config(128, 32, 64, 4, 4),
}
_16_BIT_SM_90 = {
    "huge": Config(128, 256, 64, 8, 3),
    "large": Config(128, 128, 64, 8, 3),
    "medium": Config(64, 128, 64, 4, 4),
    "small": Config(64, 64, 64, 4, 4),
    "narrow": Config(128, 64, 64, 4, 4),
    "thin": Config(128, 32, 64, 4, 4),
}
_16_BIT_SMALL = {
    "large": Config(128, 128, 32, 8, 3),
    "medium": Config(64, 128, 32, 4, 4),
    "small": Config(64, 64, 32, 4, 4),
    "narrow": Config(128, 64, 32, 4, 4),
    "thin": Config(128, 32, 32, 4, 4),
}
_TF32 = {
    "large": Config(128, 128, 32, 8, 3),
    "medium": Config(64, 128, 32, 4, 3),
    "small": Config(64, 64, 32, 4, 4),
    "narrow": Config(128, 64, 32, 4, 3),
    "thin": Config(128, 32, 32, 8, 3),
}
_TF32_SMALL = {
    "large": Config(64, 128, 32, 4, 3),
    "small": Config(64, 64, 32, 4, 3),
    "thin": Config(128, 32, 32, 4, 3),
}
# Products without tensor cores: the tile has to fit into registers that also hold both operands.
_IEEE = {"large": Config(64, 64, 16, 8, 3), "thin": Config(64, 32, 16, 4, 3)}

# (architecture's table, products: "16" for float16 and bfloat16, "tf32", "ieee") -> shape class -> configuration. A
# class that is missing takes the next smaller one that is there.
TABLE: dict[tuple[str, str], dict[str, Config]] = {
    ("sm_80", "16"): _16_BIT_SM_80,
    ("sm_90", "16"): _16_BIT_SM_90,
    ("sm_100", "16"): _16_BIT_SM_90,
    ("small", "16"): _16_BIT_SMALL,
    ("sm_80", "tf32"): _TF32,
    ("sm_90", "tf32"): _TF32,
    ("sm_100", "tf32"): _TF32,
    ("small", "tf32"): _TF32_SMALL,
    **{(name, "ieee"): _IEEE for name in ("sm_80", "sm_90", "sm_100", "small")},
}
_SMALLER = {
    "huge": ("huge", "large", "medium", "small"),
    "large": ("large", "medium", "small"),
    "medium": ("medium", "small", "large"),
    "small": ("small", "large"),
    "narrow": ("narrow", "thin", "small"),
    "thin": ("thin", "small"),
}
# The pack kernel moves data: its tile is a power of two of pixels and of channels.
PACK = Config(64, 64, 0, 4, 1)
SUM_BLOCK = 512

_override = threading.local()


class Problem(NamedTuple):
    """A product as tuning tells it from others: its kernel, sizes, taps, kind of list and parities."""

    kernel: str
    rows: int
    columns: int
    depth: int
    taps: int
    kind: int
    phases: int = 1


# (compute capability, products, problem) -> configuration: what bap_kernels.triton.tuning has measured here.
tuned: dict[tuple[int, str, Problem], Config] = {}


def overridden() -> bool:
    """Whether :func:`overriding` decides in this thread."""
    return bool(getattr(_override, "stack", None))


def architecture(capability: int) -> Architecture:
    """The facts of a compute capability; of an unknown one, those of the nearest older one."""
    known = [each for each in ARCHITECTURES if each <= capability]
    return ARCHITECTURES[max(known, default=80)]


def tiles(rows: int, columns: int, config: Config) -> int:
    """Number of tiles that cover a matrix."""
    return -(-rows // config.BM) * -(-columns // config.BN)


def shape_class(rows: int, columns: int, sm_count: int, table: dict[str, Config]) -> str:
    """The class of a shape: by its columns, then the largest tile that still fills the device.

    Examples:
        >>> from bap_kernels.triton.configs import TABLE, shape_class
        >>> shape_class(200_000, 32, 132, TABLE["sm_90", "16"])
        'thin'
        >>> shape_class(200_000, 256, 132, TABLE["sm_90", "16"])
        'huge'
        >>> shape_class(49, 2048, 132, TABLE["sm_90", "16"])
        'small'
    """
    if columns <= 32:
        return "thin"
    if columns <= 64:
        return "narrow"
    if "huge" in table and rows > 64 and columns >= 256 and tiles(rows, columns, table["huge"]) >= 2 * sm_count:
        return "huge"
    for name in ("large", "medium"):
        if name in table and 2 * rows > table[name].BM and tiles(rows, columns, table[name]) >= sm_count:
            return name
    return "small"


def choose(problem: Problem, products: str, capability: int) -> Config:
    """The configuration of a product: what was measured, else what the table has for its size.

    Args:
        products: "16", "tf32" or "ieee".
        capability: compute capability without its point.
    """
    if overridden():
        return _override.stack[-1]
    config = tuned.get((capability, products, problem)) if tuned else None
    return config or from_table(problem.rows, problem.columns, products, capability)


@functools.cache
def from_table(rows: int, columns: int, products: str, capability: int) -> Config:
    """The table's configuration for a result of ``rows`` x ``columns``."""
    facts = architecture(capability)
    table = TABLE[facts.table, products]
    largest = shape_class(rows, columns, facts.sm_count, table)
    return next(table[name] for name in _SMALLER[largest] if name in table)


def chunks(pixels: int, tile_count: int, depth: int, sm_count: int) -> tuple[int, int]:
    """Into how many chunks the pixels of a weight's gradient are cut, and the pixels of each, a multiple of ``depth``.

    Two waves of blocks at most, and at least four steps for each block.

    Examples:
        >>> from bap_kernels.triton.configs import chunks
        >>> chunks(pixels=6272, tile_count=36, depth=64, sm_count=132)
        (7, 896)
        >>> chunks(pixels=100, tile_count=36, depth=64, sm_count=132)
        (1, 128)
    """
    wanted = max(1, min(2 * sm_count // tile_count, pixels // (4 * depth)))
    length = -(-pixels // (wanted * depth)) * depth
    return -(-pixels // length), length


@functools.cache
def behind_a_list(config: Config) -> Config:
    """The configuration for loads whose address comes from another load.

    The pipeline spends a stage on the list for each stage of the tiles: this many keep as many tiles in flight.
    """
    return replace(config, stages=2 * config.stages - 1)


@functools.cache
def within_registers(config: Config, sums: int) -> Config:
    """The configuration with fewer columns, where a thread would hold more than ``sums`` sums.

    For kernels whose end keeps something else in registers beside each sum, and would spill.

    Examples:
        >>> from bap_kernels.triton.configs import Config, within_registers
        >>> within_registers(Config(128, 256, 64, 8, 3), 64)
        Config(BM=128, BN=128, BK=64, warps=8, stages=3, group_m=8)
    """
    columns = config.BN
    while config.BM * columns > 32 * config.warps * sums and columns > 16:
        columns //= 2
    return replace(config, BN=columns)


@contextlib.contextmanager
def overriding(config: Config) -> Iterator[None]:
    """Takes one configuration for every product of this thread; for tests, which want small tiles, and for tuning."""
    if not overridden():
        _override.stack = []
    _override.stack.append(config)
    try:
        yield
    finally:
        _override.stack.pop()
