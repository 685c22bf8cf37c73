"""Gradient of the gathered convolution in its input, and in a switch of its channels, by parity of the stride.

    dX[n, c, h, w] = sum over j, kh, kw of g[n, j, oh, ow] * w[i, kh, kw, j]       with c = in_list[i]
    oh = (h + TOP - kh * DH) / SH, ow = (w + LEFT - kw * DW) / SW, where both divisions come out even
    dx[n, c, h, w] = dX for i < count, else not stored
    ds[i]          = sum over n, h, w of x[n, c, h, w] * dX[n, c, h, w], one term for each block of pixels in `partial`

Pixels of one phase, (h + TOP) mod SH and (w + LEFT) mod SW, meet the same taps; stride 1 has one phase, that of the
forward with flipped taps. Channels that only ds needs are reduced in registers: their gradient is never stored.

Block:  BM pixels of one phase x BN channels; the loop runs over blocks of BK filters, inside over the phase's taps.
Grid:   (pixel tiles * channel tiles, SH * SW).
Shared memory: num_stages tiles of g (BM x BK) and w (BK x BN), laid out by the compiler.
Needs:  w packed (K_in, taps, K_out), filters contiguous; lists within range; at most 32 taps of a phase on each axis;
        N * H * W below 2^31; `partial`, where there is one, (phases * pixel tiles, K_in).
Allows: any strides and int64 offsets; lists of channels or of aligned blocks; a count on the device of the channels
        that are stored, which come first.
Accumulates in float32. No atomics: the result does not vary between runs.
"""
# Triton reads types from the call, not from annotations.
# mypy: disallow-untyped-defs=False

from typing import NamedTuple

import triton
import triton.language as tl

from bap_kernels.triton.arguments import Strides, WeightStrides
from bap_kernels.triton.device_functions import (
    listed_channels,
    multiply_add,
    pixel_coordinates,
    pixel_offsets,
    swizzled_tile,
    within_mask,
)

__all__ = ["InputGradientOptions", "InputGradientStrides", "gathered_conv2d_dgrad_kernel"]


class InputGradientStrides(NamedTuple):
    """Strides of the tensors; zeros for those that are not there."""

    g: Strides
    w: WeightStrides
    x: Strides
    dx: Strides


class InputGradientOptions(NamedTuple):
    """Constants of the kernel.

    Args:
        STEP_H, STEP_W: taps from one that a phase meets to the next: SH / gcd(SH, DH), and so for W.
        IN_LIST: see :func:`listed_channels`.
        REDUCE_OFF: whether channels that are not stored are reduced, too.
        EVEN_K: whether BK divides K_out.
        ALIGN_G: what divides the strides of n, h and w of g.
    """

    STEP_H: int
    STEP_W: int
    IN_LIST: int
    REDUCE_OFF: bool
    EVEN_K: bool
    ALIGN_G: int
    PRECISION: str
    UPCAST: bool


@triton.jit
def first_tap(phase, SIZE: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr):
    """The first tap that the pixels of a phase meet, or SIZE where they meet none."""
    first = phase * 0 + SIZE
    for t in tl.static_range(STRIDE):
        meets = (t * DILATION) % STRIDE == phase
        first = tl.where(meets & (first == SIZE), tl.minimum(t, SIZE), first)
    return first


@triton.jit
def gathered_conv2d_dgrad_kernel(
    g,
    w,
    x,
    dx,
    partial,
    in_list,
    count,
    sizes,
    strides,
    CONV: tl.constexpr,
    OPTIONS: tl.constexpr,
    TILE: tl.constexpr,
):
    """See the file's head; a phase has N * ceil(H / SH) * ceil(W / SW) `sizes.pixels`."""
    H = sizes.H
    W = sizes.W
    K_in = sizes.K_in
    K_out = sizes.K_out
    tiles_m = tl.cdiv(sizes.pixels, TILE.BM)
    tile_m, tile_n = swizzled_tile(tl.program_id(0), tiles_m, tl.cdiv(K_in, TILE.BN), TILE.GROUP_M)
    phase = tl.program_id(1)
    phase_h = phase // CONV.SW
    phase_w = phase % CONV.SW
    stored = K_in
    if count is not None:
        stored = tl.load(count)
        if not OPTIONS.REDUCE_OFF:  # noqa: SIM102  this one is decided at compile time
            if tile_n * TILE.BN >= stored:
                return
    m = tile_m * TILE.BM + tl.arange(0, TILE.BM)
    i = tile_n * TILE.BN + tl.arange(0, TILE.BN)
    i_mask = i < K_in
    n, h, ww = pixel_coordinates(m, tl.cdiv(H, CONV.SH), tl.cdiv(W, CONV.SW))
    # The first pixel of the phase that lies in the image; the offsets keep the operands of % above zero.
    h = h * CONV.SH + (phase_h + (CONV.SH - CONV.TOP % CONV.SH)) % CONV.SH
    ww = ww * CONV.SW + (phase_w + (CONV.SW - CONV.LEFT % CONV.SW)) % CONV.SW
    m_mask = (m < sizes.pixels) & (h < H) & (ww < W)

    first_h = first_tap(phase_h, CONV.KH, CONV.SH, CONV.DH)
    first_w = first_tap(phase_w, CONV.KW, CONV.SW, CONV.DW)
    taps_w = tl.cdiv(CONV.KW - first_w, OPTIONS.STEP_W)
    taps = tl.cdiv(CONV.KH - first_h, OPTIONS.STEP_H) * taps_w
    oh = (h + CONV.TOP - phase_h) // CONV.SH - (first_h * CONV.DH - phase_h) // CONV.SH
    ow = (ww + CONV.LEFT - phase_w) // CONV.SW - (first_w * CONV.DW - phase_w) // CONV.SW
    # From one tap of a phase to the next the result's row falls by this.
    FALL_H: tl.constexpr = OPTIONS.STEP_H * CONV.DH // CONV.SH
    FALL_W: tl.constexpr = OPTIONS.STEP_W * CONV.DW // CONV.SW
    h_mask = within_mask(oh, sizes.oH, -FALL_H, (CONV.KH + OPTIONS.STEP_H - 1) // OPTIONS.STEP_H)
    w_mask = within_mask(ow, sizes.oW, -FALL_W, (CONV.KW + OPTIONS.STEP_W - 1) // OPTIONS.STEP_W)
    g_rows = tl.multiple_of(pixel_offsets(n, oh, ow, strides.g), [OPTIONS.ALIGN_G])
    w_columns = w + i.to(tl.int64) * strides.w.row

    acc = tl.zeros((TILE.BM, TILE.BN), dtype=tl.float32)
    for step in range(0, tl.cdiv(K_out, TILE.BK) * taps):
        t = step % taps
        th = t // taps_w
        tw = t % taps_w
        j = step // taps * TILE.BK + tl.arange(0, TILE.BK)
        g_mask = (m_mask & (((h_mask >> th) & (w_mask >> tw) & 1) != 0))[:, None]
        weight_mask = i_mask[None, :]
        if not OPTIONS.EVEN_K:
            g_mask = g_mask & (j < K_out)[None, :]
            weight_mask = weight_mask & (j < K_out)[:, None]
        fall = tl.cast(th * FALL_H, tl.int64) * strides.g.h + tl.cast(tw * FALL_W, tl.int64) * strides.g.w
        g_pixels = g_rows - tl.multiple_of(fall, [OPTIONS.ALIGN_G])
        tap = (first_h + th * OPTIONS.STEP_H) * CONV.KW + first_w + tw * OPTIONS.STEP_W
        g_tile = tl.load(g + g_pixels[:, None] + j.to(tl.int64)[None, :] * strides.g.c, mask=g_mask, other=0.0)
        w_tile = tl.load(w_columns[None, :] + tap * strides.w.tap + j[:, None], mask=weight_mask, other=0.0)
        acc = multiply_add(g_tile, w_tile, acc, OPTIONS.PRECISION, OPTIONS.UPCAST)

    channels = listed_channels(in_list, i, i_mask, OPTIONS.IN_LIST).to(tl.int64)
    if partial is not None:
        x_mask = i_mask if OPTIONS.REDUCE_OFF else i < stored
        mask = m_mask[:, None] & x_mask[None, :]
        offsets = pixel_offsets(n, h, ww, strides.x)[:, None] + channels[None, :] * strides.x.c
        x_tile = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
        # Outside the mask acc may be what a NaN in an unused column of w left.
        terms = tl.where(mask, acc * x_tile, 0.0)
        row = tl.cast(phase * tiles_m + tile_m, tl.int64) * K_in
        tl.store(partial + row + i, tl.sum(terms, axis=0), mask=i_mask)
    if dx is not None:
        offsets = pixel_offsets(n, h, ww, strides.dx)[:, None] + channels[None, :] * strides.dx.c
        tl.store(dx + offsets, acc.to(dx.dtype.element_ty), mask=m_mask[:, None] & (i_mask & (i < stored))[None, :])
