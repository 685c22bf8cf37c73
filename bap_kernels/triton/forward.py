"""Forward of the gathered convolution as an implicit GEMM over pixels.

    x'[n, c, h, w]  = relu?(in_scale[i] * x[n, c, h, w] + in_shift[i])   with c = in_list[i]; zero padding after it
    y[n, j, oh, ow] = relu?(out_scale[j] * (sum over i, kh, kw of w[j, kh, kw, i] * x'[n, c, ih, iw] + bias[o])
                            + out_shift[j] + residual[n, j, oh, ow])     with o = out_list[j]
    ih = oh * SH - TOP + kh * DH, iw = ow * SW - LEFT + kw * DW

Block:  BM result pixels x BN computed channels; the loop runs over blocks of BK channels, inside over the taps.
Grid:   (pixel tiles * channel tiles,), GROUP_M pixel tiles side by side; of a mixed batch in the order of `tiles`.
Shared memory: num_stages tiles of x (BM x BK) and w (BK x BN), laid out by the compiler.
Needs:  w packed (K_out, taps, K_in), channels contiguous; lists within range; kH and kW of at most 32; N * oH * oW
        below 2^31.
Allows: any strides and int64 offsets; lists of channels or of aligned blocks; a count of channels on the device, which
        cuts the in-list short; a full-width result, whose other channels are left alone; a mixed batch (MIXED), where
        each domain's run of images has its list and weight, and `tiles` holds (first pixel, run) of every pixel tile;
        a second store (HAS_COPY) of the filters j whose places[j] is a channel of `copy`; those at -1 are left out.
Accumulates in float32. No atomics: the result does not vary between runs.
"""
# Triton reads types from the call, not from annotations.
# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from bap_kernels.triton.device import listed_channels, reaching, run_of_batch, swizzled_tile

__all__ = ["gathered_conv2d_fwd_kernel"]

COPIED_AT_ONCE = tl.constexpr(8)


@triton.jit
def gathered_conv2d_fwd_kernel(
    x,
    w,
    y,
    in_list,
    out_list,
    count,
    bias,
    in_scale,
    in_shift,
    out_scale,
    out_shift,
    residual,
    copy,
    places,
    runs,
    tiles,
    pixels,
    H,
    W,
    oH,
    oW,
    K_in,
    K_out,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_wj,
    stride_wt,
    stride_yn,
    stride_yc,
    stride_yh,
    stride_yw,
    stride_rn,
    stride_rc,
    stride_rh,
    stride_rw,
    stride_cn,
    stride_cc,
    stride_ch,
    stride_cw,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    TOP: tl.constexpr,
    LEFT: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    IN_LIST: tl.constexpr,
    OUT_LIST: tl.constexpr,
    MIXED: tl.constexpr,
    HAS_COUNT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_IN_SCALE: tl.constexpr,
    HAS_IN_SHIFT: tl.constexpr,
    IN_RELU: tl.constexpr,
    HAS_OUT_SCALE: tl.constexpr,
    HAS_OUT_SHIFT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    OUT_RELU: tl.constexpr,
    FULL_WIDTH: tl.constexpr,
    HAS_COPY: tl.constexpr,
    INSIDE: tl.constexpr,
    EVEN_K: tl.constexpr,
    ALIGN_X: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """See the file's head. INSIDE: no tap leaves the input; ALIGN_X divides the strides of n, h and w of x."""
    TAPS: tl.constexpr = KH * KW
    if MIXED:
        tiles_n = tl.cdiv(K_out, BN)
        tile_n = tl.program_id(0) % tiles_n
        tile = tiles + tl.program_id(0) // tiles_n * 2
        start = tl.load(tile).to(tl.int32)
        pixels, K_in, list_offset, w_offset, stride_wt = run_of_batch(runs, tl.load(tile + 1))
        w += w_offset
        stride_wj = stride_wt * TAPS
        if IN_LIST == 0:
            # A compact copy, whose channels are padded with zeros as those of the weight are.
            K_in = stride_wt.to(tl.int32)
        else:
            in_list += list_offset
            K_in = tl.multiple_of(K_in, [IN_LIST])
    else:
        tile_m, tile_n = swizzled_tile(tl.program_id(0), tl.cdiv(pixels, BM), tl.cdiv(K_out, BN), GROUP_M)
        start = tile_m * BM
    m = start + tl.arange(0, BM)
    j = tile_n * BN + tl.arange(0, BN)
    m_mask = m < pixels
    j_mask = j < K_out
    ow = m % oW
    oh = m // oW % oH
    n = (m // (oW * oH)).to(tl.int64)
    top = oh * SH - TOP
    left = ow * SW - LEFT
    rows = n * stride_xn + top.to(tl.int64) * stride_xh + left.to(tl.int64) * stride_xw
    rows = tl.multiple_of(rows, [ALIGN_X])
    if not INSIDE:
        reach_h = reaching(top, H, DH, KH)
        reach_w = reaching(left, W, DW, KW)
    if HAS_COUNT:
        K_in = tl.load(count)
    w_columns = w + j.to(tl.int64) * stride_wj

    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for step in range(0, tl.cdiv(K_in, BK) * TAPS):
        if TAPS == 1:
            kh = 0
            kw = 0
        else:
            kh = step % TAPS // KW
            kw = step % KW
        k = step // TAPS * BK + tl.arange(0, BK)
        k_mask = k < K_in
        channels = listed_channels(in_list, k, k_mask, IN_LIST)
        x_mask = m_mask
        if not INSIDE:
            x_mask = x_mask & (((reach_h >> kh) & (reach_w >> kw) & 1) != 0)
        x_mask = x_mask[:, None]
        w_mask = j_mask[None, :]
        if not EVEN_K:
            x_mask = x_mask & k_mask[None, :]
            # Rows of w end in zeros; those of channels behind a count hold anything.
            w_mask = w_mask & (k_mask if HAS_COUNT else k < stride_wt)[:, None]
        tap = tl.cast(kh * DH, tl.int64) * stride_xh + tl.cast(kw * DW, tl.int64) * stride_xw
        tap = tl.multiple_of(tap, [ALIGN_X])
        x_tile = tl.load(x + (rows + tap)[:, None] + channels.to(tl.int64)[None, :] * stride_xc, mask=x_mask, other=0.0)
        w_tile = tl.load(w_columns[None, :] + (kh * KW + kw) * stride_wt + k[:, None], mask=w_mask, other=0.0)
        if HAS_IN_SCALE or HAS_IN_SHIFT or IN_RELU:
            value = x_tile.to(tl.float32)
            if HAS_IN_SCALE:
                value *= tl.load(in_scale + k, mask=k_mask, other=0.0).to(tl.float32)[None, :]
            if HAS_IN_SHIFT:
                value += tl.load(in_shift + k, mask=k_mask, other=0.0).to(tl.float32)[None, :]
            if IN_RELU:
                value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
            x_tile = tl.where(x_mask, value, 0.0).to(x_tile.dtype)
        if UPCAST:
            x_tile = x_tile.to(tl.float32)
            w_tile = w_tile.to(tl.float32)
        acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION)

    outputs = listed_channels(out_list, j, j_mask, OUT_LIST)
    if HAS_BIAS:
        acc += tl.load(bias + outputs, mask=j_mask, other=0.0).to(tl.float32)[None, :]
    if HAS_OUT_SCALE:
        acc *= tl.load(out_scale + j, mask=j_mask, other=0.0).to(tl.float32)[None, :]
    if HAS_OUT_SHIFT:
        acc += tl.load(out_shift + j, mask=j_mask, other=0.0).to(tl.float32)[None, :]
    y_mask = m_mask[:, None] & j_mask[None, :]
    if HAS_RESIDUAL:
        place = n * stride_rn + oh.to(tl.int64) * stride_rh + ow.to(tl.int64) * stride_rw
        place = place[:, None] + j.to(tl.int64)[None, :] * stride_rc
        acc += tl.load(residual + place, mask=y_mask, other=0.0).to(tl.float32)
    if OUT_RELU:
        acc = tl.maximum(acc, 0.0, propagate_nan=tl.PropagateNan.ALL)
    columns = outputs if FULL_WIDTH else j
    place = n * stride_yn + oh.to(tl.int64) * stride_yh + ow.to(tl.int64) * stride_yw
    place = place[:, None] + columns.to(tl.int64)[None, :] * stride_yc
    tl.store(y + place, acc.to(y.dtype.element_ty), mask=y_mask)
    if HAS_COPY:
        # From where the block has just written it, some filters at a time: the addresses of a whole tile, each of them
        # its own, would not fit into registers beside it.
        tl.debug_barrier()
        y_rows = y + n * stride_yn + oh.to(tl.int64) * stride_yh + ow.to(tl.int64) * stride_yw
        copy_rows = copy + n * stride_cn + oh.to(tl.int64) * stride_ch + ow.to(tl.int64) * stride_cw
        for first in range(0, BN, COPIED_AT_ONCE):
            some = tile_n * BN + first + tl.arange(0, COPIED_AT_ONCE)
            mask = m_mask[:, None] & (some < K_out)[None, :]
            to = tl.load(places + some, mask=some < K_out, other=-1)
            result = tl.load(y_rows[:, None] + some.to(tl.int64)[None, :] * stride_yc, mask=mask)
            tl.store(copy_rows[:, None] + to.to(tl.int64)[None, :] * stride_cc, result, mask=mask & (to >= 0)[None, :])
