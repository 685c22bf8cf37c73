"""Gradient of the gathered convolution in its input, and in a switch of its channels, by parity of the stride.

    dX[n, c, h, w] = sum over j, kh, kw of g[n, j, oh, ow] * w[i, kh, kw, j]       with c = in_list[i]
    oh = (h + TOP - kh * DH) / SH, ow = (w + LEFT - kw * DW) / SW, where both divisions come out even
    dx[n, c, h, w] = dX for i < count, else not stored
    ds[i]          = sum over n, h, w of x[n, c, h, w] * dX[n, c, h, w], one term for each block of pixels in `partial`

Pixels of one phase, (h + TOP) mod SH and (w + LEFT) mod SW, meet the same taps; stride 1 has one phase, that of the
forward with flipped taps. Channels that only ds wants are reduced in registers: their gradient is never stored.

Block:  BM pixels of one phase x BN channels; the loop runs over blocks of BK filters, inside over the phase's taps.
Grid:   (pixel tiles * channel tiles, SH * SW).
Shared memory: num_stages tiles of g (BM x BK) and w (BK x BN), laid out by the compiler.
Needs:  w packed (K_in, taps, K_out), filters contiguous; lists within range; at most 32 taps of a phase on each axis;
        N * H * W below 2^31; `partial` (phases * pixel tiles, K_in) where REDUCE.
Allows: any strides and int64 offsets; lists of channels or of aligned blocks; a count on the device of the channels
        that are stored, which come first.
Accumulates in float32. No atomics: the result does not vary between runs.
"""
# Triton reads types from the call, not from annotations.
# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from bap_kernels.triton.device import listed_channels, reaching, swizzled_tile

__all__ = ["gathered_conv2d_dgrad_kernel"]


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
    pixels,
    H,
    W,
    oH,
    oW,
    K_in,
    K_out,
    stride_gn,
    stride_gc,
    stride_gh,
    stride_gw,
    stride_wi,
    stride_wt,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_dn,
    stride_dc,
    stride_dh,
    stride_dw,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    TOP: tl.constexpr,
    LEFT: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    STEP_H: tl.constexpr,
    STEP_W: tl.constexpr,
    IN_LIST: tl.constexpr,
    HAS_COUNT: tl.constexpr,
    STORE: tl.constexpr,
    REDUCE: tl.constexpr,
    REDUCE_OFF: tl.constexpr,
    EVEN_K: tl.constexpr,
    ALIGN_G: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """See the file's head. STEP_H = SH / gcd(SH, DH); a phase has N * ceil(H / SH) * ceil(W / SW) `pixels`."""
    tiles_m = tl.cdiv(pixels, BM)
    tile_m, tile_n = swizzled_tile(tl.program_id(0), tiles_m, tl.cdiv(K_in, BN), GROUP_M)
    phase = tl.program_id(1)
    phase_h = phase // SW
    phase_w = phase % SW
    stored = K_in
    if HAS_COUNT:
        stored = tl.load(count)
        if not REDUCE_OFF:  # noqa: SIM102  one is decided at compile time
            if tile_n * BN >= stored:
                return
    m = tile_m * BM + tl.arange(0, BM)
    i = tile_n * BN + tl.arange(0, BN)
    i_mask = i < K_in
    rows_of_phase = tl.cdiv(H, SH)
    columns_of_phase = tl.cdiv(W, SW)
    # The first pixel of the phase that lies in the image; the offsets keep the operands of % above zero.
    h = m // columns_of_phase % rows_of_phase * SH + (phase_h + (SH - TOP % SH)) % SH
    ww = m % columns_of_phase * SW + (phase_w + (SW - LEFT % SW)) % SW
    n = (m // (columns_of_phase * rows_of_phase)).to(tl.int64)
    m_mask = (m < pixels) & (h < H) & (ww < W)

    first_h = first_tap(phase_h, KH, SH, DH)
    first_w = first_tap(phase_w, KW, SW, DW)
    taps_h = tl.cdiv(KH - first_h, STEP_H)
    taps_w = tl.cdiv(KW - first_w, STEP_W)
    taps = taps_h * taps_w
    oh = (h + TOP - phase_h) // SH - (first_h * DH - phase_h) // SH
    ow = (ww + LEFT - phase_w) // SW - (first_w * DW - phase_w) // SW
    # From one tap of a phase to the next the result's row falls by this.
    FALL_H: tl.constexpr = STEP_H * DH // SH
    FALL_W: tl.constexpr = STEP_W * DW // SW
    reach_h = reaching(oh, oH, -FALL_H, (KH + STEP_H - 1) // STEP_H)
    reach_w = reaching(ow, oW, -FALL_W, (KW + STEP_W - 1) // STEP_W)
    rows = n * stride_gn + oh.to(tl.int64) * stride_gh + ow.to(tl.int64) * stride_gw
    rows = tl.multiple_of(rows, [ALIGN_G])
    w_columns = w + i.to(tl.int64) * stride_wi

    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for step in range(0, tl.cdiv(K_out, BK) * taps):
        t = step % taps
        th = t // taps_w
        tw = t % taps_w
        j = step // taps * BK + tl.arange(0, BK)
        g_mask = (m_mask & (((reach_h >> th) & (reach_w >> tw) & 1) != 0))[:, None]
        w_mask = i_mask[None, :]
        if not EVEN_K:
            g_mask = g_mask & (j < K_out)[None, :]
            w_mask = w_mask & (j < K_out)[:, None]
        fall = tl.cast(th * FALL_H, tl.int64) * stride_gh + tl.cast(tw * FALL_W, tl.int64) * stride_gw
        fall = tl.multiple_of(fall, [ALIGN_G])
        tap = (first_h + th * STEP_H) * KW + first_w + tw * STEP_W
        g_tile = tl.load(g + (rows - fall)[:, None] + j.to(tl.int64)[None, :] * stride_gc, mask=g_mask, other=0.0)
        w_tile = tl.load(w_columns[None, :] + tap * stride_wt + j[:, None], mask=w_mask, other=0.0)
        if UPCAST:
            g_tile = g_tile.to(tl.float32)
            w_tile = w_tile.to(tl.float32)
        acc = tl.dot(g_tile, w_tile, acc, input_precision=PRECISION)

    channels = listed_channels(in_list, i, i_mask, IN_LIST).to(tl.int64)
    if REDUCE:
        x_mask = i_mask if REDUCE_OFF else i < stored
        place = n * stride_xn + h.to(tl.int64) * stride_xh + ww.to(tl.int64) * stride_xw
        place = place[:, None] + channels[None, :] * stride_xc
        x_tile = tl.load(x + place, mask=m_mask[:, None] & x_mask[None, :], other=0.0).to(tl.float32)
        # Outside the mask acc may be what a NaN in an unused column of w left.
        terms = tl.where(m_mask[:, None] & x_mask[None, :], acc * x_tile, 0.0)
        row = tl.cast(phase * tiles_m + tile_m, tl.int64) * K_in
        tl.store(partial + row + i, tl.sum(terms, axis=0), mask=i_mask)
    if STORE:
        place = n * stride_dn + h.to(tl.int64) * stride_dh + ww.to(tl.int64) * stride_dw
        place = place[:, None] + channels[None, :] * stride_dc
        tl.store(dx + place, acc.to(dx.dtype.element_ty), mask=m_mask[:, None] & (i_mask & (i < stored))[None, :])
