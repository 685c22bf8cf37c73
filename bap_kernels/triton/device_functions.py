"""What the kernels share on the device: addresses, channel lists, order of tiles, prologue, product, epilogue."""
# Triton reads types from the call, not from annotations.
# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

__all__ = [
    "apply_epilogue",
    "listed_channels",
    "load_run",
    "multiply_add",
    "pixel_coordinates",
    "pixel_offsets",
    "scale_and_shift",
    "swizzled_tile",
    "within_mask",
]


@triton.jit
def listed_channels(index, positions, mask, LIST: tl.constexpr):
    """Channels at ``positions`` of a list. LIST: 0 no list, 1 a channel an entry, else a block of LIST an entry."""
    if LIST == 0:
        channels = positions
    elif LIST == 1:
        channels = tl.load(index + positions, mask=mask, other=0)
    else:
        channels = tl.load(index + positions // LIST, mask=mask, other=0) * LIST + positions % LIST
        # The compiler knows nothing of what a list holds; without this it loads channel by channel.
        channels = tl.max_contiguous(tl.multiple_of(channels, [LIST]), [LIST])
    return channels


@triton.jit
def pixel_coordinates(m, H, W):
    """Image (int64), row and column of pixel m, counted row after row and image after image."""
    return (m // (W * H)).to(tl.int64), m // W % H, m % W


@triton.jit
def pixel_offsets(n, h, w, strides):
    """Offsets of pixels in elements, int64; ``n`` is int64."""
    return n * strides.n + h.to(tl.int64) * strides.h + w.to(tl.int64) * strides.w


@triton.jit
def within_mask(first, size, STEP: tl.constexpr, COUNT: tl.constexpr):
    """Bit t of the result: whether the row (or column) first + t * STEP lies within 0 .. size - 1."""
    bits = tl.zeros_like(first)
    for t in tl.static_range(COUNT):
        coordinate = first + t * STEP
        bits |= ((coordinate >= 0) & (coordinate < size)).to(tl.int32) << t
    return bits


@triton.jit
def swizzled_tile(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Row and column of a tile; GROUP_M rows of tiles run side by side, so that they share columns in the L2 cache."""
    first_m = tile // (GROUP_M * tiles_n) * GROUP_M
    rows = tl.minimum(tiles_m - first_m, GROUP_M)
    number = tile % (GROUP_M * tiles_n)
    return first_m + number % rows, number // rows


@triton.jit
def load_run(runs, run):
    """A domain's run of a mixed batch: end of its pixels, K_in, offsets of its list and weight, length of a row of w.

    Offsets are in elements, from the first run's list and weight: each may have memory of its own.
    """
    entry = runs + run * 5
    end = tl.load(entry).to(tl.int32)
    K_in = tl.load(entry + 1).to(tl.int32)
    weight = tl.multiple_of(tl.load(entry + 3), 16)
    row = tl.multiple_of(tl.load(entry + 4), 16)
    return end, K_in, tl.load(entry + 2), weight, row


@triton.jit
def load_vector(vector, index, mask, AXIS: tl.constexpr):
    """Entries of a per-channel vector in float32, with an axis of length 1 inserted at AXIS."""
    return tl.expand_dims(tl.load(vector + index, mask=mask, other=0.0).to(tl.float32), AXIS)


@triton.jit
def scale_and_shift(tile, scale, shift, index, mask, RELU: tl.constexpr, AXIS: tl.constexpr):
    """relu?(scale * tile + shift) in float32, by channel; the tile itself where nothing is asked for."""
    if scale is not None or shift is not None or RELU:
        tile = tile.to(tl.float32)
        if scale is not None:
            tile *= load_vector(scale, index, mask, AXIS)
        if shift is not None:
            tile += load_vector(shift, index, mask, AXIS)
        if RELU:
            tile = tl.maximum(tile, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tile


@triton.jit
def apply_prologue(tile, mask, prologue, k, k_mask, RELU: tl.constexpr, AXIS: tl.constexpr):
    """The transform of what is read; zero outside the mask, since padding comes after it."""
    if prologue.scale is not None or prologue.shift is not None or RELU:
        value = scale_and_shift(tile, prologue.scale, prologue.shift, k, k_mask, RELU, AXIS)
        tile = tl.where(mask, value, 0.0).to(tile.dtype)
    return tile


@triton.jit
def multiply_add(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """The sum of acc and a @ b; PRECISION as for tl.dot, UPCAST both operands to float32 first."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def apply_epilogue(
    acc, epilogue, j, filters, j_mask, n, h, w, mask, residual_strides, RELU: tl.constexpr, AXIS: tl.constexpr
):
    """relu?(scale * (acc + bias) + shift + residual); filters j along the axis that AXIS leaves, pixels along AXIS."""
    if epilogue.bias is not None:
        acc += load_vector(epilogue.bias, filters, j_mask, AXIS)
    acc = scale_and_shift(acc, epilogue.scale, epilogue.shift, j, j_mask, False, AXIS)
    if epilogue.residual is not None:
        pixels = tl.expand_dims(pixel_offsets(n, h, w, residual_strides), 1 - AXIS)
        offsets = pixels + tl.expand_dims(j.to(tl.int64) * residual_strides.c, AXIS)
        acc += tl.load(epilogue.residual + offsets, mask=mask, other=0.0).to(tl.float32)
    if RELU:
        acc = tl.maximum(acc, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return acc
