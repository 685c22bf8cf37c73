"""Arguments of the kernels in groups: Triton takes a named tuple for each, of pointers, of integers or of constants."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = [
    "Conv",
    "EpilogueTensors",
    "ForwardOptions",
    "ForwardStrides",
    "Lists",
    "Mixed",
    "PrologueTensors",
    "Sizes",
    "Strides",
    "Tile",
    "WeightStrides",
]


class Lists(NamedTuple):
    """The lists of a launch, int32; None for all channels.

    Args:
        in_list: channels that are read, or numbers of blocks of them.
        out_list: filters that are computed, likewise.
        in_count: (1,): how many channels of ``in_list`` are used; None: all.
    """

    in_list: Tensor | None = None
    out_list: Tensor | None = None
    in_count: Tensor | None = None


class PrologueTensors(NamedTuple):
    """Vectors of the channels that are read, in the order of their list."""

    scale: Tensor | None = None
    shift: Tensor | None = None


class EpilogueTensors(NamedTuple):
    """What the end of a convolution reads, and its second store.

    Args:
        bias: (C_out,).
        scale, shift: (K_out,).
        residual: (N, K_out, oH, oW).
        dual: (N, K, oH, oW), the second result.
        dual_channels: int32, (K_out,): each filter's channel of ``dual``, or -1.
    """

    bias: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    residual: Tensor | None = None
    dual: Tensor | None = None
    dual_channels: Tensor | None = None


class Mixed(NamedTuple):
    """The runs of a mixed batch: neighbouring images of one domain; see ``load_run``.

    Args:
        runs: int64, (runs, 5).
        tiles: int64, (tiles, 2): where each tile begins, a pixel or an image, and its run.
    """

    runs: Tensor
    tiles: Tensor


class Sizes(NamedTuple):
    """Pixels that a kernel counts, sizes of input and result, numbers of listed channels and filters."""

    pixels: int
    H: int
    W: int
    oH: int  # noqa: N815
    oW: int  # noqa: N815
    K_in: int
    K_out: int


class Strides(NamedTuple):
    """Strides of a tensor (N, C, H, W) in elements."""

    n: int
    c: int
    h: int
    w: int


class WeightStrides(NamedTuple):
    """Strides of a packed weight in elements; its last axis is dense."""

    row: int
    tap: int


class ForwardStrides(NamedTuple):
    """Strides of the tensors of a forward; zeros for those that are not there."""

    x: Strides
    w: WeightStrides
    y: Strides
    residual: Strides
    dual: Strides


class ForwardOptions(NamedTuple):
    """Constants of a forward kernel.

    Args:
        IN_LIST, OUT_LIST: see ``listed_channels``.
        FULL_WIDTH: whether the result holds all filters.
        INSIDE: whether no tap leaves the input.
        EVEN_K: whether BK divides K_in.
        ALIGN_X: what divides offsets of x, in elements; see the kernel.
        PRECISION, UPCAST: see ``multiply_add``.
    """

    IN_LIST: int
    OUT_LIST: int
    IN_RELU: bool
    OUT_RELU: bool
    FULL_WIDTH: bool
    INSIDE: bool
    EVEN_K: bool
    ALIGN_X: int
    PRECISION: str
    UPCAST: bool


class Conv(NamedTuple):
    """Constants of a convolution; TOP and LEFT are its padding."""

    KH: int
    KW: int
    SH: int
    SW: int
    TOP: int
    LEFT: int
    DH: int
    DW: int


class Tile(NamedTuple):
    """Rows, columns and depth of a block's tile, and rows of tiles that run side by side."""

    BM: int
    BN: int
    BK: int
    GROUP_M: int
