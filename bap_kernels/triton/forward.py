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
        cuts the in-list short; a full-width result, whose other channels are left alone; a mixed batch, where
        each domain's run of images has its list and weight, and `mixed.tiles` holds (first pixel, run) of every tile;
        a second store of the filters j whose dual_channels[j] is a channel of `dual`; those at -1 are left out.
Accumulates in float32. No atomics: the result does not vary between runs.
"""
# Triton reads types from the call, not from annotations.
# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from bap_kernels.triton.device_functions import (
    apply_epilogue,
    apply_prologue,
    listed_channels,
    load_run,
    multiply_add,
    pixel_coordinates,
    pixel_offsets,
    swizzled_tile,
    within_mask,
)

__all__ = ["gathered_conv2d_fwd_kernel"]

FILTERS_PER_STORE = tl.constexpr(8)


@triton.jit
def gathered_conv2d_fwd_kernel(
    x,
    w,
    y,
    lists,
    prologue,
    epilogue,
    mixed,
    sizes,
    strides,
    CONV: tl.constexpr,
    OPTIONS: tl.constexpr,
    TILE: tl.constexpr,
):
    """See the file's head; the groups are those of :mod:`bap_kernels.triton.arguments`.

    OPTIONS.ALIGN_X divides the strides of n, h and w of x.
    """
    TAPS: tl.constexpr = CONV.KH * CONV.KW
    pixels = sizes.pixels
    K_in = sizes.K_in
    K_out = sizes.K_out
    in_list = lists.in_list
    stride_wj = strides.w.row
    stride_wt = strides.w.tap
    if mixed is not None:
        tiles_n = tl.cdiv(K_out, TILE.BN)
        tile_n = tl.program_id(0) % tiles_n
        tile = mixed.tiles + tl.program_id(0) // tiles_n * 2
        start = tl.load(tile).to(tl.int32)
        pixels, K_in, list_offset, w_offset, stride_wt = load_run(mixed.runs, tl.load(tile + 1))
        w += w_offset
        stride_wj = stride_wt * TAPS
        if OPTIONS.IN_LIST == 0:
            # A compact copy, whose channels are padded with zeros as those of the weight are.
            K_in = stride_wt.to(tl.int32)
        else:
            in_list += list_offset
            K_in = tl.multiple_of(K_in, [OPTIONS.IN_LIST])
    else:
        tiles_m = tl.cdiv(pixels, TILE.BM)
        tile_m, tile_n = swizzled_tile(tl.program_id(0), tiles_m, tl.cdiv(K_out, TILE.BN), TILE.GROUP_M)
        start = tile_m * TILE.BM
    if lists.in_count is not None:
        K_in = tl.load(lists.in_count)
    m = start + tl.arange(0, TILE.BM)
    j = tile_n * TILE.BN + tl.arange(0, TILE.BN)
    m_mask = m < pixels
    j_mask = j < K_out
    n, oh, ow = pixel_coordinates(m, sizes.oH, sizes.oW)
    top = oh * CONV.SH - CONV.TOP
    left = ow * CONV.SW - CONV.LEFT
    x_rows = tl.multiple_of(pixel_offsets(n, top, left, strides.x), [OPTIONS.ALIGN_X])
    if not OPTIONS.INSIDE:
        h_mask = within_mask(top, sizes.H, CONV.DH, CONV.KH)
        w_mask = within_mask(left, sizes.W, CONV.DW, CONV.KW)
    w_columns = w + j.to(tl.int64) * stride_wj

    acc = tl.zeros((TILE.BM, TILE.BN), dtype=tl.float32)
    for step in range(0, tl.cdiv(K_in, TILE.BK) * TAPS):
        if TAPS == 1:
            kh = 0
            kw = 0
        else:
            kh = step % TAPS // CONV.KW
            kw = step % CONV.KW
        k = step // TAPS * TILE.BK + tl.arange(0, TILE.BK)
        k_mask = k < K_in
        channels = listed_channels(in_list, k, k_mask, OPTIONS.IN_LIST)
        x_mask = m_mask
        if not OPTIONS.INSIDE:
            x_mask = x_mask & (((h_mask >> kh) & (w_mask >> kw) & 1) != 0)
        x_mask = x_mask[:, None]
        weight_mask = j_mask[None, :]
        if not OPTIONS.EVEN_K:
            x_mask = x_mask & k_mask[None, :]
            # Rows of w end in zeros; those of channels behind a count hold anything.
            weight_mask = weight_mask & (k_mask if lists.in_count is not None else k < stride_wt)[:, None]
        tap = tl.cast(kh * CONV.DH, tl.int64) * strides.x.h + tl.cast(kw * CONV.DW, tl.int64) * strides.x.w
        x_pixels = x_rows + tl.multiple_of(tap, [OPTIONS.ALIGN_X])
        x_tile = tl.load(x + x_pixels[:, None] + channels.to(tl.int64)[None, :] * strides.x.c, mask=x_mask, other=0.0)
        w_tile = tl.load(w_columns[None, :] + (kh * CONV.KW + kw) * stride_wt + k[:, None], mask=weight_mask, other=0.0)
        x_tile = apply_prologue(x_tile, x_mask, prologue, k, k_mask, OPTIONS.IN_RELU, 0)
        acc = multiply_add(x_tile, w_tile, acc, OPTIONS.PRECISION, OPTIONS.UPCAST)

    filters = listed_channels(lists.out_list, j, j_mask, OPTIONS.OUT_LIST)
    y_mask = m_mask[:, None] & j_mask[None, :]
    acc = apply_epilogue(acc, epilogue, j, filters, j_mask, n, oh, ow, y_mask, strides.residual, OPTIONS.OUT_RELU, 0)
    y_pixels = pixel_offsets(n, oh, ow, strides.y)
    columns = filters if OPTIONS.FULL_WIDTH else j
    offsets = y_pixels[:, None] + columns.to(tl.int64)[None, :] * strides.y.c
    tl.store(y + offsets, acc.to(y.dtype.element_ty), mask=y_mask)
    if epilogue.dual is not None:
        # From where the block has just written it, some filters at a time: the addresses of a whole tile, each of them
        # its own, would not fit into registers beside it.
        tl.debug_barrier()
        dual_pixels = pixel_offsets(n, oh, ow, strides.dual)
        for first in range(0, TILE.BN, FILTERS_PER_STORE):
            some = tile_n * TILE.BN + first + tl.arange(0, FILTERS_PER_STORE)
            mask = m_mask[:, None] & (some < K_out)[None, :]
            dual = tl.load(epilogue.dual_channels + some, mask=some < K_out, other=-1)
            result = tl.load(y + y_pixels[:, None] + some.to(tl.int64)[None, :] * strides.y.c, mask=mask)
            dual_offsets = dual_pixels[:, None] + dual.to(tl.int64)[None, :] * strides.dual.c
            tl.store(epilogue.dual + dual_offsets, result, mask=mask & (dual >= 0)[None, :])
