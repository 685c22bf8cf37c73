"""Gathered 1x1 convolution of a planar tensor as a GEMM whose rows are channels, which reads any list in place.

    x'[n, c, p] = relu?(in_scale[i] * x[n, c, p] + in_shift[i])                          with c = in_list[i]
    y[n, j, p]  = relu?(out_scale[j] * (sum over i of w[j, i] * x'[n, c, p] + bias[o])
                        + out_shift[j] + residual[n, j, p])                              with o = out_list[j]
    p counts the H * W pixels of a plane

The list selects rows of a tile, and each row holds neighbouring pixels, read as 128-bit vectors where planes and
pointers are aligned. With the lists exchanged and a full-width result it is the input's gradient.

Block:  BM computed channels x BN pixels of one image.
Grid:   (channel tiles * pixel tiles, N), GROUP_M channel tiles side by side. N is at most 65535.
Shared memory: num_stages tiles of w (BM x BK) and x (BK x BN), laid out by the compiler.
Needs:  pixels of x and y one element apart; w packed (K_out, K_in), channels contiguous; lists within range.
Allows: any strides of planes and images, int64 offsets; any strides of the residual; a count of channels on the device,
        which cuts the in-list short; a full-width result, whose other channels are left alone; a mixed batch, where
        each domain's run of images has its list and weight, and `mixed.tiles` holds (image, run) of every image; a
        second store of the filters j whose dual_channels[j] is a channel of `dual`, laid out as y is.
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
    swizzled_tile,
)

__all__ = ["gathered_conv2d_planar_fwd_kernel"]


@triton.jit
def gathered_conv2d_planar_fwd_kernel(
    x, w, y, lists, prologue, epilogue, mixed, sizes, strides, OPTIONS: tl.constexpr, TILE: tl.constexpr
):
    """See the file's head; the groups are those of :mod:`bap_kernels.triton.arguments`.

    OPTIONS.ALIGN_X divides the strides of n and c of x, and the pixels of a plane.
    """
    pixels = sizes.pixels
    K_in = sizes.K_in
    in_list = lists.in_list
    stride_wj = strides.w.row
    tiles_m = tl.cdiv(sizes.K_out, TILE.BM)
    tile_m, tile_n = swizzled_tile(tl.program_id(0), tiles_m, tl.cdiv(pixels, TILE.BN), TILE.GROUP_M)
    if mixed is not None:
        tile = mixed.tiles + tl.program_id(1) * 2
        n = tl.load(tile)
        _, K_in, list_offset, w_offset, stride_wj = load_run(mixed.runs, tl.load(tile + 1))
        w += w_offset
        in_list += list_offset
    else:
        n = tl.program_id(1).to(tl.int64)
    if lists.in_count is not None:
        K_in = tl.load(lists.in_count)
    j = tile_m * TILE.BM + tl.arange(0, TILE.BM)
    p = tile_n * TILE.BN + tl.arange(0, TILE.BN)
    j_mask = j < sizes.K_out
    # Groups of ALIGN_X pixels are inside or outside as a whole.
    p_mask = p < tl.multiple_of(tl.cast(pixels, tl.int32), [OPTIONS.ALIGN_X])
    x_image = x + tl.multiple_of(n * strides.x.n, [OPTIONS.ALIGN_X])
    w_rows = w + j.to(tl.int64) * stride_wj

    acc = tl.zeros((TILE.BM, TILE.BN), dtype=tl.float32)
    for first in range(0, K_in, TILE.BK):
        k = first + tl.arange(0, TILE.BK)
        k_mask = k < K_in
        channels = listed_channels(in_list, k, k_mask, OPTIONS.IN_LIST)
        x_mask = p_mask[None, :]
        w_mask = j_mask[:, None]
        if not OPTIONS.EVEN_K:
            x_mask = x_mask & k_mask[:, None]
            # Rows of w end in zeros; those of channels behind a count hold anything.
            w_mask = w_mask & (k_mask if lists.in_count is not None else k < stride_wj)[None, :]
        planes = tl.multiple_of(channels.to(tl.int64) * strides.x.c, [OPTIONS.ALIGN_X])
        x_tile = tl.load(x_image + planes[:, None] + p[None, :], mask=x_mask, other=0.0)
        w_tile = tl.load(w_rows[:, None] + k[None, :], mask=w_mask, other=0.0)
        x_tile = apply_prologue(x_tile, x_mask, prologue, k, k_mask, OPTIONS.IN_RELU, 1)
        acc = multiply_add(w_tile, x_tile, acc, OPTIONS.PRECISION, OPTIONS.UPCAST)

    filters = listed_channels(lists.out_list, j, j_mask, OPTIONS.OUT_LIST)
    y_mask = j_mask[:, None] & p_mask[None, :]
    h = p // sizes.W
    acc = apply_epilogue(
        acc, epilogue, j, filters, j_mask, n, h, p % sizes.W, y_mask, strides.residual, OPTIONS.OUT_RELU, 1
    )
    rows = filters if OPTIONS.FULL_WIDTH else j
    offsets = n * strides.y.n + rows.to(tl.int64)[:, None] * strides.y.c + p[None, :]
    result = acc.to(y.dtype.element_ty)
    tl.store(y + offsets, result, mask=y_mask)
    if epilogue.dual is not None:
        dual = tl.load(epilogue.dual_channels + j, mask=j_mask, other=-1)
        offsets = n * strides.dual.n + dual.to(tl.int64)[:, None] * strides.dual.c + p[None, :]
        tl.store(epilogue.dual + offsets, result, mask=y_mask & (dual >= 0)[:, None])
