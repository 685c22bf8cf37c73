"""Copy of listed channels into a compact tensor whose channels are contiguous, with an optional transform.

    y[n, p, i] = relu?(scale[i] * x[n, c, p] + shift[i])   with c = list[i], zero for i from K to K_pad

Block:  BM pixels x BN channels of one image: read along the axis on which x is contiguous, written along channels.
Grid:   (N * pixel tiles * channel tiles,).
Shared memory: one tile, where the compiler has to transpose it.
Needs:  y (N, H * W, K_pad) dense; lists within range.
Allows: any strides of x, int64 offsets; lists of channels or of aligned blocks; a count of channels on the device:
        tiles beyond it are not written; a mixed batch, where each domain's run of images has its list, and
        `mixed.tiles` holds (image, run) of every image: tiles beyond a run's own channels, rounded up, are not written.
Computes in float32. No atomics: the result does not vary between runs.
"""
# Triton reads types from the call, not from annotations.
# mypy: disallow-untyped-defs=False

from typing import NamedTuple

import triton
import triton.language as tl

from bap_kernels.triton.device_functions import listed_channels, load_run, scale_and_shift

__all__ = ["PackOptions", "PackSizes", "channel_pack_kernel"]


class PackSizes(NamedTuple):
    """Pixels of an image, its width, and channels: listed ones, and those of the copy."""

    pixels: int
    W: int
    K: int
    K_pad: int


class PackOptions(NamedTuple):
    """Constants of the kernel.

    Args:
        LIST: see :func:`listed_channels`.
        FLAT: whether the stride of w holds from one row to the next.
        ALIGN_X: what divides the stride of n of x.
    """

    LIST: int
    RELU: bool
    FLAT: bool
    ALIGN_X: int
    BM: int
    BN: int


@triton.jit
def channel_pack_kernel(x, y, in_list, count, prologue, mixed, sizes, x_strides, OPTIONS: tl.constexpr):
    """See the file's head; the groups are those of :mod:`bap_kernels.triton.arguments`."""
    pixels = sizes.pixels
    K = sizes.K
    K_pad = sizes.K_pad
    tiles_m = tl.cdiv(pixels, OPTIONS.BM)
    tiles_n = tl.cdiv(K_pad, OPTIONS.BN)
    tile = tl.program_id(0)
    first = tile % tiles_n * OPTIONS.BN
    i = first + tl.arange(0, OPTIONS.BN)
    p = tile // tiles_n % tiles_m * OPTIONS.BM + tl.arange(0, OPTIONS.BM)
    n = (tile // (tiles_n * tiles_m)).to(tl.int64)
    if mixed is not None:
        entry = mixed.tiles + n * 2
        n = tl.load(entry)
        _, K, list_offset, _, row = load_run(mixed.runs, tl.load(entry + 1))
        in_list += list_offset
        if first >= row:
            return
    if count is not None:
        K = tl.load(count)
        if first >= K:
            return
    p_mask = p < pixels
    i_mask = i < K
    channels = listed_channels(in_list, i, i_mask, OPTIONS.LIST).to(tl.int64) * x_strides.c
    image = tl.multiple_of(n * x_strides.n, [OPTIONS.ALIGN_X])
    if OPTIONS.FLAT:
        offsets = image + p.to(tl.int64) * x_strides.w
    else:
        offsets = image + ((p // sizes.W).to(tl.int64) * x_strides.h + (p % sizes.W).to(tl.int64) * x_strides.w)
    tile_mask = p_mask[:, None] & i_mask[None, :]
    value = tl.load(x + offsets[:, None] + channels[None, :], mask=tile_mask, other=0.0)
    value = scale_and_shift(value, prologue.scale, prologue.shift, i, i_mask, OPTIONS.RELU, 0)
    offsets = (n * pixels + p)[:, None] * K_pad + i[None, :]
    tl.store(y + offsets, value.to(y.dtype.element_ty), mask=p_mask[:, None] & (i < K_pad)[None, :])
