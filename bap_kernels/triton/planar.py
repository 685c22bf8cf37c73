"""Gathered 1x1 convolution of a planar tensor as a GEMM whose rows are channels, so that any list costs nothing.

    x'[n, c, p] = relu?(in_scale[i] * x[n, c, p] + in_shift[i])                          with c = in_list[i]
    y[n, j, p]  = relu?(out_scale[j] * (sum over i of w[j, i] * x'[n, c, p] + bias[o])
                        + out_shift[j] + residual[n, j, p])                              with o = out_list[j]
    p counts the H * W pixels of a plane

The list stands on the strided axis: each row of a tile is a run of neighbouring pixels, read in words of 16 bytes where
planes and pointers are aligned. With the lists changed over and a full-width result it is the input's gradient.

Block:  BM computed channels x BN pixels of one image.
Grid:   (channel tiles * pixel tiles, N), GROUP_M channel tiles side by side. N is at most 65535.
Shared memory: num_stages tiles of w (BM x BK) and x (BK x BN), laid out by the compiler.
Needs:  pixels of x and y one element apart; w packed (K_out, K_in), channels contiguous; lists within range.
Allows: any strides of planes and images, int64 offsets; any strides of the residual; a count of channels on the device,
        which cuts the in-list short; a full-width result, whose other channels are left alone; a mixed batch (MIXED),
        where each domain's run of images has its list and weight, and `tiles` holds (image, run) of every image; a
        second store (HAS_COPY) of the filters j whose places[j] is a channel of `copy`, laid out as y is.
Accumulates in float32. No atomics: the result does not vary between runs.
"""
# Triton reads types from the call, not from annotations.
# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from bap_kernels.triton.device import listed_channels, run_of_batch, swizzled_tile

__all__ = ["gathered_conv2d_planar_fwd_kernel"]


@triton.jit
def gathered_conv2d_planar_fwd_kernel(
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
    W,
    K_in,
    K_out,
    stride_xn,
    stride_xc,
    stride_wj,
    stride_yn,
    stride_yc,
    stride_rn,
    stride_rc,
    stride_rh,
    stride_rw,
    stride_cn,
    stride_cc,
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
    EVEN_K: tl.constexpr,
    ALIGN_X: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """See the file's head. ALIGN_X divides the strides of n and c of x, and the pixels of a plane."""
    tile_m, tile_n = swizzled_tile(tl.program_id(0), tl.cdiv(K_out, BM), tl.cdiv(pixels, BN), GROUP_M)
    if MIXED:
        tile = tiles + tl.program_id(1) * 2
        n = tl.load(tile)
        _, K_in, list_offset, w_offset, stride_wj = run_of_batch(runs, tl.load(tile + 1))
        w += w_offset
        in_list += list_offset
    else:
        n = tl.program_id(1).to(tl.int64)
    j = tile_m * BM + tl.arange(0, BM)
    p = tile_n * BN + tl.arange(0, BN)
    j_mask = j < K_out
    # Runs of ALIGN_X pixels are inside or outside as a whole.
    p_mask = p < tl.multiple_of(tl.cast(pixels, tl.int32), [ALIGN_X])
    if HAS_COUNT:
        K_in = tl.load(count)
    x_image = x + tl.multiple_of(n * stride_xn, [ALIGN_X])
    w_rows = w + j.to(tl.int64) * stride_wj

    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for first in range(0, K_in, BK):
        k = first + tl.arange(0, BK)
        k_mask = k < K_in
        channels = listed_channels(in_list, k, k_mask, IN_LIST)
        x_mask = p_mask[None, :]
        w_mask = j_mask[:, None]
        if not EVEN_K:
            x_mask = x_mask & k_mask[:, None]
            # Rows of w end in zeros; those of channels behind a count hold anything.
            w_mask = w_mask & (k_mask if HAS_COUNT else k < stride_wj)[None, :]
        planes = tl.multiple_of(channels.to(tl.int64) * stride_xc, [ALIGN_X])
        x_tile = tl.load(x_image + planes[:, None] + p[None, :], mask=x_mask, other=0.0)
        w_tile = tl.load(w_rows[:, None] + k[None, :], mask=w_mask, other=0.0)
        if HAS_IN_SCALE or HAS_IN_SHIFT or IN_RELU:
            value = x_tile.to(tl.float32)
            if HAS_IN_SCALE:
                value *= tl.load(in_scale + k, mask=k_mask, other=0.0).to(tl.float32)[:, None]
            if HAS_IN_SHIFT:
                value += tl.load(in_shift + k, mask=k_mask, other=0.0).to(tl.float32)[:, None]
            if IN_RELU:
                value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
            x_tile = tl.where(x_mask, value, 0.0).to(x_tile.dtype)
        if UPCAST:
            x_tile = x_tile.to(tl.float32)
            w_tile = w_tile.to(tl.float32)
        acc = tl.dot(w_tile, x_tile, acc, input_precision=PRECISION)

    outputs = listed_channels(out_list, j, j_mask, OUT_LIST)
    if HAS_BIAS:
        acc += tl.load(bias + outputs, mask=j_mask, other=0.0).to(tl.float32)[:, None]
    if HAS_OUT_SCALE:
        acc *= tl.load(out_scale + j, mask=j_mask, other=0.0).to(tl.float32)[:, None]
    if HAS_OUT_SHIFT:
        acc += tl.load(out_shift + j, mask=j_mask, other=0.0).to(tl.float32)[:, None]
    y_mask = j_mask[:, None] & p_mask[None, :]
    if HAS_RESIDUAL:
        place = n * stride_rn + (p // W).to(tl.int64) * stride_rh + (p % W).to(tl.int64) * stride_rw
        place = j.to(tl.int64)[:, None] * stride_rc + place[None, :]
        acc += tl.load(residual + place, mask=y_mask, other=0.0).to(tl.float32)
    if OUT_RELU:
        acc = tl.maximum(acc, 0.0, propagate_nan=tl.PropagateNan.ALL)
    rows = outputs if FULL_WIDTH else j
    place = n * stride_yn + rows.to(tl.int64)[:, None] * stride_yc + p[None, :]
    result = acc.to(y.dtype.element_ty)
    tl.store(y + place, result, mask=y_mask)
    if HAS_COPY:
        to = tl.load(places + j, mask=j_mask, other=-1)
        place = n * stride_cn + to.to(tl.int64)[:, None] * stride_cc + p[None, :]
        tl.store(copy + place, result, mask=y_mask & (to >= 0)[:, None])
