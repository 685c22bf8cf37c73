"""Small convolutions with unusual shapes, strides and layouts, for :mod:`tools.search_convolution_faults`."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
DIRECTIONS = ("forward", "input", "weight", "both")

# Scale, shift, residual and ReLU behind a convolution.
Epilogue = tuple[Tensor | None, Tensor | None, Tensor | None, bool]


@dataclass(frozen=True)
class Case:
    """One convolution; ``number`` is the seed of its values. Pairs are (height, width)."""

    number: int
    batch: int
    c_in: int
    c_out: int
    groups: int
    size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    dtype: str
    layout: str
    weight_layout: str
    grad_layout: str
    bias: bool
    threads: int
    direction: str  # of DIRECTIONS: the result, or gradients of input and weight

    @property
    def out(self) -> tuple[int, int]:
        """(oH, oW)."""
        geometry = zip(self.size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        h, w = ((size + 2 * padding - dilation * (k - 1) - 1) // s + 1 for size, k, s, padding, dilation in geometry)
        return h, w

    @property
    def gradients(self) -> list[str]:
        """The gradients to compute."""
        return [name for name in ("input", "weight") if self.direction in (name, "both")]


def draw(seed: int, number: int, narrow: bool = False, wide: bool = False) -> Case:
    """Draw a small case with more unusual values than real layers have.

    Args:
        seed: Of the search.
        number: Of the case.
        narrow: Results of at most 5 columns, a horizontal stride or padding, and wider inputs and kernels.
        wide: Kernels of 5 to 16 columns.
    """
    rng = random.Random(f"{seed}/{number}")

    def pair(*values: int) -> tuple[int, int]:
        return rng.choice(values), rng.choice(values)

    while True:
        kind = rng.choice(("dense", "dense", "dense", "depthwise", "grouped"))
        c_in, c_out = (rng.choice((1, 1, 2, 3, 4, 5, 8, 13, 16, 17, 32, 40, 64)) for _ in range(2))
        groups = 1
        if kind == "depthwise":
            groups = c_out = c_in
        elif kind == "grouped":
            groups = rng.choice((2, 3))
            c_in, c_out = c_in * groups, c_out * groups
        large = narrow or wide
        case = Case(
            number,
            rng.choice((1, 1, 2, 2, 3, 16)),
            c_in,
            c_out,
            groups,
            pair(1, 1, 2, 3, 4, 5, 7, 9, 12, 17, 33, *((16, 24, 64) if large else ())),
            pair(1, 1, 2, 3, 3, 5, *((7, 11, 14, 16) if large else ())),
            pair(1, 1, 2, 3, *((4, 7, 16) if large else ())),
            pair(0, 0, 1, 2, *((3,) if narrow else ())),
            pair(1, 1, 1, 2, 3),
            rng.choice((*["float32"] * 3, *["bfloat16"] * 3, "float16", "float64")),
            rng.choice(("contiguous", *["channels_last"] * 2, "ambiguous", "sliced", "sliced_last", "expanded")),
            rng.choice(("contiguous", "contiguous", "channels_last")),
            rng.choice(("contiguous", "channels_last", "ambiguous", "sliced", "expanded")),
            rng.random() < 0.5,
            rng.choice((1, 2)),
            rng.choice(("forward", *DIRECTIONS)),
        )
        work = case.batch * c_out * (c_in // groups) * case.kernel[0] * case.kernel[1]
        if narrow and (case.out[1] > 5 or (case.stride[1] == 1 and case.padding[1] == 0)):
            continue
        if wide and case.kernel[1] < 5:
            continue
        if min(case.out) >= 1 and work * case.out[0] * case.out[1] < 3_000_000:
            return case


def known() -> list[Case]:
    """Cases in which PyTorch 2.14 is wrong or crashes on one CPU or another: some of each class of faults."""
    # (direction, batch, (C_in, C_out, groups), size, kernel, stride, padding, dilation, layout)
    none, unit, last = (0, 0), (1, 1), "channels_last"
    # One output column from several input columns.
    rows: list[tuple[Any, ...]] = [
        ("forward", 2, (c_in, 5, 1), (9, width), (3, kernel), (1, stride), none, unit, layout)
        for c_in, width, kernel, stride in ((1, 3, 3, 2), (1, 7, 2, 7), (13, 5, 3, 3), (2, 3, 2, 2), (40, 4, 2, 2))
        for layout in (last, "sliced_last")
    ]
    rows.append(("forward", 2, (1, 1, 1), (9, 3), (3, 3), (1, 2), none, (2, 1), last))
    for direction in ("forward", "input", "weight"):
        # Output rows or columns that read padding alone.
        rows += [
            (direction, 2, (8, 8, 1), (9, 1), (1, 1), (1, 2), (0, 1), (1, 3), last),
            (direction, 2, (16, 16, 1), (9, 1), (3, 1), (1, 3), (1, 2), (2, 2), last),
            (direction, 2, (6, 6, 6), (9, 1), (3, 1), (1, 2), (0, 1), unit, last),
            (direction, 2, (32, 1, 1), (1, 9), (2, 3), (1, 2), (2, 0), (3, 1), last),
            (direction, 2, (8, 8, 1), (9, 12), (3, 5), (1, 7), (1, 3), unit, last),
        ]
    # Gradients of narrow images.
    rows += [
        (direction, 2, channels, (9, width), (3, kernel), (1, stride), (1, padding), unit, last)
        for direction in ("weight", "both")
        for width, kernel, stride, padding in ((1, 3, 2, 1), (1, 3, 2, 2), (2, 3, 3, 2), (5, 5, 16, 1), (4, 5, 5, 3))
        for channels in ((5, 4, 1), (4, 4, 4))
    ]
    # 1x1 with strides and few channels.
    strides = ((3, 1), (1, 3), (2, 2))
    rows += [("weight", 2, (c, 8, 1), (9, 9), unit, s, none, unit, last) for s in strides for c in (1, 2, 8)]
    # Wide kernels over few channels.
    wide = ((16, 4, 4), (24, 4, 4), (16, 6, 6), (8, 8, 1), (12, 8, 8), (4, 16, 2), (6, 16, 3), (2, 32, 1))
    rows += [
        ("forward", 1, (c_in, 8, 1), (5, 70), (height, width), (1, stride), none, unit, last)
        for c_in, width, stride in wide
        for height in (1, 3)
    ]
    cases: list[Case] = []
    for dtype, (direction, batch, channels, *geometry, layout) in product(("float32", "bfloat16", "float16"), rows):
        fields: list[Any] = [*channels, *geometry, dtype, layout, "contiguous", "contiguous", True, 1, direction]
        cases.append(Case(len(cases), batch, *fields))
    return cases


def lay_out(t: Tensor, layout: str, rng: random.Random) -> Tensor:
    """Return the values of ``t`` in another layout; ``ambiguous`` gives dimensions of size 1 arbitrary strides."""
    if layout == "expanded":
        return t[:1].contiguous().expand(t.shape)
    if layout == "ambiguous":
        _, c, h, w = t.shape
        dense = t.contiguous(memory_format=rng.choice((torch.channels_last, torch.contiguous_format)))
        arbitrary = (1, c, w, h * w, c * h * w, c * w)
        strides = [
            rng.choice((*arbitrary, stride)) if size == 1 else stride
            for size, stride in zip(t.shape, dense.stride(), strict=True)
        ]
        return dense.as_strided(t.shape, strides)
    memory_format = torch.channels_last if layout in ("channels_last", "sliced_last") else torch.contiguous_format
    if layout in ("sliced", "sliced_last"):
        n, c, h, w = t.shape
        base = t.new_full((n + 1, c + 2, h + 1, w + 1), float("nan")).contiguous(memory_format=memory_format)
        return base[1:, 1 : c + 1, 1:, :w].copy_(t)
    return t.contiguous(memory_format=memory_format)


def draw_lists(case: Case, rng: random.Random) -> tuple[list[int] | None, list[int] | None]:
    """Draw in-list and out-list; they are equal for depthwise cases."""

    def some(n: int) -> list[int] | None:
        return None if rng.random() < 0.4 else rng.sample(range(n), rng.randint(1, n))

    in_list = some(case.c_in)
    return in_list, in_list if case.groups > 1 else some(case.c_out)


def draw_epilogue(shape: tuple[int, ...], case: Case, rng: random.Random, generator: torch.Generator) -> Epilogue:
    """Draw scale, shift, residual (None: there is none) and whether there is a ReLU; all values are integers."""

    def some(*size: int) -> Tensor | None:
        return torch.randint(-3, 4, size, generator=generator) if rng.random() < 0.5 else None

    scale, shift, residual = some(shape[1]), some(shape[1]), some(*shape)
    if residual is not None:
        residual = lay_out(residual.to(DTYPES[case.dtype]), rng.choice((case.layout, case.grad_layout)), rng)
    scale, shift = (None if vector is None else vector.float() for vector in (scale, shift))
    return scale, shift, residual, rng.random() < 0.5
