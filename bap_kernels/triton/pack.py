"""Copy of listed channels into a compact tensor whose channels are contiguous, with an optional transform.

    y[n, p, i] = relu?(scale[i] * x[n, c, p] + shift[i])   with c = list[i], zero for i from K to K_pad

Block:  BM pixels x BN channels of one image: read along the axis on which x is contiguous, written along channels.
Grid:   (N * pixel tiles * channel tiles,).
Shared memory: one tile, where the compiler has to transpose it.
Needs:  y (N, H * W, K_pad) dense; lists within range.
Allows: any strides of x, int64 offsets; lists of channels or of aligned blocks; a count of channels on the device:
        tiles beyond it are not written; a mixed batch (MIXED), where each domain's run of images has its list, and
        `tiles` holds (image, run) of every image: tiles beyond a run's own channels, rounded up, are not written.
Computes in float32. No atomics: the result does not vary between runs.
"""
# Triton reads types from the call, not from annotations.
# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from bap_kernels.triton.device import listed_channels, run_of_batch

__all__ = ["channel_pack_kernel"]


@triton.jit
def channel_pack_kernel(
    x,
    y,
    in_list,
    count,
    scale,
    shift,
    runs,
    tiles,
    pixels,
    W,
    K,
    K_pad,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    LIST: tl.constexpr,
    MIXED: tl.constexpr,
    HAS_COUNT: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    RELU: tl.constexpr,
    FLAT: tl.constexpr,
    ALIGN_X: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """See the file's head. FLAT: pixels stand stride_xw apart across rows too; ALIGN_X divides the stride of n."""
    tiles_m = tl.cdiv(pixels, BM)
    tiles_n = tl.cdiv(K_pad, BN)
    tile = tl.program_id(0)
    i = tile % tiles_n * BN + tl.arange(0, BN)
    p = tile // tiles_n % tiles_m * BM + tl.arange(0, BM)
    n = (tile // (tiles_n * tiles_m)).to(tl.int64)
    if MIXED:
        entry = tiles + n * 2
        n = tl.load(entry)
        _, K, list_offset, _, row = run_of_batch(runs, tl.load(entry + 1))
        in_list += list_offset
        if tile % tiles_n * BN >= row:
            return
    if HAS_COUNT:
        K = tl.load(count)
        if tile % tiles_n * BN >= K:
            return
    p_mask = p < pixels
    i_mask = i < K
    channels = listed_channels(in_list, i, i_mask, LIST).to(tl.int64) * stride_xc
    if FLAT:
        places = p.to(tl.int64) * stride_xw
    else:
        places = (p // W).to(tl.int64) * stride_xh + (p % W).to(tl.int64) * stride_xw
    image = tl.multiple_of(n * stride_xn, [ALIGN_X])
    value = tl.load(x + image + places[:, None] + channels[None, :], mask=p_mask[:, None] & i_mask[None, :], other=0.0)
    if HAS_SCALE or HAS_SHIFT or RELU:
        value = value.to(tl.float32)
        if HAS_SCALE:
            value *= tl.load(scale + i, mask=i_mask, other=0.0).to(tl.float32)[None, :]
        if HAS_SHIFT:
            value += tl.load(shift + i, mask=i_mask, other=0.0).to(tl.float32)[None, :]
        if RELU:
            value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
    place = (n * pixels + p)[:, None] * K_pad + i[None, :]
    tl.store(y + place, value.to(y.dtype.element_ty), mask=p_mask[:, None] & (i < K_pad)[None, :])
