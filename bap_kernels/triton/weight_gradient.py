"""Gradient of the gathered convolution in its weight: a GEMM over pixels, split into chunks that are added in order.

    partial[s, j, t, i]   = sum over the pixels (n, oh, ow) of chunk s of g[n, j, oh, ow] * x[n, c, ih, iw]
    dw[o, c, kh, kw]      = sum over s of partial[s, j, t, i]     with t = kh * KW + kw, o = out_list[j], c = in_list[i]
    ih = oh * SH - TOP + kh * DH, iw = ow * SW - LEFT + kw * DW

gathered_conv2d_wgrad_kernel
Block:  BM filters x BN channels of one tap; the loop runs over blocks of BK pixels of one chunk.
Grid:   (filter tiles * channel tiles * taps, chunks).
Shared memory: num_stages tiles of g (BM x BK) and x (BK x BN), laid out by the compiler.

sum_partials_kernel
Block:  BLOCK entries of dw, chunk after chunk. Grid: (entry tiles,).

Needs:  lists within range; N * oH * oW and K_out * taps * K_in below 2^31.
Allows: any strides and int64 offsets; lists of channels or of aligned blocks; a count of channels on the device, beyond
        which nothing is computed or stored.
Accumulates in float32. No atomics: the result does not vary between runs.
"""
# Triton reads types from the call, not from annotations.
# mypy: disallow-untyped-defs=False

from typing import NamedTuple

import triton
import triton.language as tl

from bap_kernels.triton.arguments import Strides
from bap_kernels.triton.device_functions import listed_channels, multiply_add, pixel_coordinates, pixel_offsets

__all__ = [
    "SumOptions",
    "SumSizes",
    "SumStrides",
    "WeightGradientOptions",
    "WeightGradientStrides",
    "gathered_conv2d_wgrad_kernel",
    "sum_partials_kernel",
]


class WeightGradientStrides(NamedTuple):
    """Strides of the tensors."""

    g: Strides
    x: Strides


class WeightGradientOptions(NamedTuple):
    """Constants of the kernel.

    Args:
        IN_LIST: see :func:`listed_channels`.
        INSIDE: whether no tap leaves the input.
        ALIGN_G: what divides the strides of n, h and w of g, and K_out.
        ALIGN_X: what divides those of x, and K_in.
    """

    IN_LIST: int
    INSIDE: bool
    ALIGN_G: int
    ALIGN_X: int
    PRECISION: str
    UPCAST: bool


class SumSizes(NamedTuple):
    """Entries that are added, K_out * TAPS * K_in; chunks; listed channels."""

    entries: int
    chunks: int
    K_in: int


class SumStrides(NamedTuple):
    """Strides of `partial`, by chunk, filter and tap, and of dw."""

    chunk: int
    row: int
    tap: int
    dw: Strides


class SumOptions(NamedTuple):
    """Constants of the kernel; for the lists see :func:`listed_channels`."""

    KW: int
    TAPS: int
    IN_LIST: int
    OUT_LIST: int
    BLOCK: int


@triton.jit
def gathered_conv2d_wgrad_kernel(
    g, x, partial, in_list, count, chunk, sizes, strides, CONV: tl.constexpr, OPTIONS: tl.constexpr, TILE: tl.constexpr
):
    """See the file's head; `chunk` is the number of pixels of a chunk."""
    TAPS: tl.constexpr = CONV.KH * CONV.KW
    K_in = sizes.K_in
    K_out = sizes.K_out
    tile = tl.program_id(0)
    split = tl.program_id(1)
    tiles_n = tl.cdiv(K_in, TILE.BN)
    # Blocks that run side by side read the same pixels.
    tap = tile % TAPS
    tile_n = tile // TAPS % tiles_n
    tile_m = tile // (TAPS * tiles_n)
    kh = tap // CONV.KW
    kw = tap % CONV.KW
    j = tile_m * TILE.BM + tl.arange(0, TILE.BM)
    i = tile_n * TILE.BN + tl.arange(0, TILE.BN)
    j_mask = j < tl.multiple_of(tl.cast(K_out, tl.int32), [OPTIONS.ALIGN_G])
    used = tl.multiple_of(tl.cast(K_in, tl.int32), [OPTIONS.ALIGN_X])
    if count is not None:
        used = tl.load(count)
        if tile_n * TILE.BN >= used:
            return
    i_mask = i < used
    channels = listed_channels(in_list, i, i_mask, OPTIONS.IN_LIST).to(tl.int64) * strides.x.c
    filters = j.to(tl.int64) * strides.g.c

    acc = tl.zeros((TILE.BM, TILE.BN), dtype=tl.float32)
    first = split * chunk
    for start in range(first, tl.minimum(first + chunk, sizes.pixels), TILE.BK):
        m = start + tl.arange(0, TILE.BK)
        m_mask = (m < sizes.pixels) & (m < first + chunk)
        n, oh, ow = pixel_coordinates(m, sizes.oH, sizes.oW)
        ih = oh * CONV.SH - CONV.TOP + kh * CONV.DH
        iw = ow * CONV.SW - CONV.LEFT + kw * CONV.DW
        x_mask = m_mask
        if not OPTIONS.INSIDE:
            x_mask = x_mask & (ih >= 0) & (ih < sizes.H) & (iw >= 0) & (iw < sizes.W)
        offsets = tl.multiple_of(pixel_offsets(n, oh, ow, strides.g), [OPTIONS.ALIGN_G])
        g_tile = tl.load(g + filters[:, None] + offsets[None, :], mask=j_mask[:, None] & m_mask[None, :], other=0.0)
        offsets = tl.multiple_of(pixel_offsets(n, ih, iw, strides.x), [OPTIONS.ALIGN_X])
        x_tile = tl.load(x + offsets[:, None] + channels[None, :], mask=x_mask[:, None] & i_mask[None, :], other=0.0)
        acc = multiply_add(g_tile, x_tile, acc, OPTIONS.PRECISION, OPTIONS.UPCAST)

    row = (tl.cast(split, tl.int64) * K_out + j) * TAPS + tap
    tl.store(partial + row[:, None] * K_in + i[None, :], acc, mask=j_mask[:, None] & i_mask[None, :])


@triton.jit
def sum_partials_kernel(partial, dw, lists, sizes, strides, OPTIONS: tl.constexpr):
    """See the file's head."""
    e = tl.program_id(0) * OPTIONS.BLOCK + tl.arange(0, OPTIONS.BLOCK)
    i = e % sizes.K_in
    tap = e // sizes.K_in % OPTIONS.TAPS
    j = e // (sizes.K_in * OPTIONS.TAPS)
    mask = e < sizes.entries
    if lists.in_count is not None:
        mask = mask & (i < tl.load(lists.in_count))
    terms = partial + j.to(tl.int64) * strides.row + tap * strides.tap + i
    total = tl.zeros((OPTIONS.BLOCK,), dtype=tl.float32)
    for s in range(0, sizes.chunks):
        total += tl.load(terms + tl.cast(s, tl.int64) * strides.chunk, mask=mask, other=0.0)
    channels = listed_channels(lists.in_list, i, mask, OPTIONS.IN_LIST).to(tl.int64)
    filters = listed_channels(lists.out_list, j, mask, OPTIONS.OUT_LIST).to(tl.int64)
    offsets = pixel_offsets(filters, tap // OPTIONS.KW, tap % OPTIONS.KW, strides.dw) + channels * strides.dw.c
    tl.store(dw + offsets, total.to(dw.dtype.element_ty), mask=mask)
