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

import triton
import triton.language as tl

from bap_kernels.triton.device import listed_channels

__all__ = ["gathered_conv2d_wgrad_kernel", "sum_partials_kernel"]


@triton.jit
def gathered_conv2d_wgrad_kernel(
    g,
    x,
    partial,
    in_list,
    count,
    pixels,
    chunk,
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
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    TOP: tl.constexpr,
    LEFT: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    IN_LIST: tl.constexpr,
    HAS_COUNT: tl.constexpr,
    INSIDE: tl.constexpr,
    ALIGN_G: tl.constexpr,
    ALIGN_X: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """See the file's head. INSIDE: no tap leaves the input; ALIGN_* divide the strides of n, h, w, and the channels."""
    TAPS: tl.constexpr = KH * KW
    tile = tl.program_id(0)
    split = tl.program_id(1)
    tiles_n = tl.cdiv(K_in, BN)
    # Blocks that run side by side read the same pixels.
    tap = tile % TAPS
    tile_n = tile // TAPS % tiles_n
    tile_m = tile // (TAPS * tiles_n)
    kh = tap // KW
    kw = tap % KW
    j = tile_m * BM + tl.arange(0, BM)
    i = tile_n * BN + tl.arange(0, BN)
    j_mask = j < tl.multiple_of(tl.cast(K_out, tl.int32), [ALIGN_G])
    used = tl.multiple_of(tl.cast(K_in, tl.int32), [ALIGN_X])
    if HAS_COUNT:
        used = tl.load(count)
        if tile_n * BN >= used:
            return
    i_mask = i < used
    channels = listed_channels(in_list, i, i_mask, IN_LIST).to(tl.int64) * stride_xc
    filters = j.to(tl.int64) * stride_gc

    acc = tl.zeros((BM, BN), dtype=tl.float32)
    first = split * chunk
    for start in range(first, tl.minimum(first + chunk, pixels), BK):
        m = start + tl.arange(0, BK)
        m_mask = (m < pixels) & (m < first + chunk)
        ow = m % oW
        oh = m // oW % oH
        n = (m // (oW * oH)).to(tl.int64)
        ih = oh * SH - TOP + kh * DH
        iw = ow * SW - LEFT + kw * DW
        reached = m_mask
        if not INSIDE:
            reached = reached & (ih >= 0) & (ih < H) & (iw >= 0) & (iw < W)
        places = n * stride_gn + oh.to(tl.int64) * stride_gh + ow.to(tl.int64) * stride_gw
        places = tl.multiple_of(places, [ALIGN_G])
        g_tile = tl.load(g + filters[:, None] + places[None, :], mask=j_mask[:, None] & m_mask[None, :], other=0.0)
        places = n * stride_xn + ih.to(tl.int64) * stride_xh + iw.to(tl.int64) * stride_xw
        places = tl.multiple_of(places, [ALIGN_X])
        x_tile = tl.load(x + places[:, None] + channels[None, :], mask=reached[:, None] & i_mask[None, :], other=0.0)
        if UPCAST:
            g_tile = g_tile.to(tl.float32)
            x_tile = x_tile.to(tl.float32)
        acc = tl.dot(g_tile, x_tile, acc, input_precision=PRECISION)

    row = (tl.cast(split, tl.int64) * K_out + j) * TAPS + tap
    tl.store(partial + row[:, None] * K_in + i[None, :], acc, mask=j_mask[:, None] & i_mask[None, :])


@triton.jit
def sum_partials_kernel(
    partial,
    dw,
    in_list,
    out_list,
    count,
    entries,
    chunks,
    K_in,
    stride_ps,
    stride_pj,
    stride_pt,
    stride_dj,
    stride_di,
    stride_dh,
    stride_dw,
    KW: tl.constexpr,
    TAPS: tl.constexpr,
    IN_LIST: tl.constexpr,
    OUT_LIST: tl.constexpr,
    HAS_COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """See the file's head. `entries` are those that are added, K_out * TAPS * K_in."""
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    i = e % K_in
    tap = e // K_in % TAPS
    j = e // (K_in * TAPS)
    mask = e < entries
    if HAS_COUNT:
        mask = mask & (i < tl.load(count))
    terms = partial + j.to(tl.int64) * stride_pj + tap * stride_pt + i
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for s in range(0, chunks):
        total += tl.load(terms + tl.cast(s, tl.int64) * stride_ps, mask=mask, other=0.0)
    channels = listed_channels(in_list, i, mask, IN_LIST).to(tl.int64)
    filters = listed_channels(out_list, j, mask, OUT_LIST).to(tl.int64)
    place = filters * stride_dj + channels * stride_di + (tap // KW) * stride_dh + (tap % KW) * stride_dw
    tl.store(dw + place, total.to(dw.dtype.element_ty), mask=mask)
