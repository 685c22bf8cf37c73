"""What the kernels share on the device: channel numbers of a list, runs of a mixed batch, and the order of tiles."""
# Triton reads types from the call, not from annotations.
# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

__all__ = ["listed_channels", "reaching", "run_of_batch", "swizzled_tile"]


@triton.jit
def listed_channels(index, places, mask, LIST: tl.constexpr):
    """Channels at ``places`` of a list. LIST: 0 no list, 1 a channel an entry, else a block of LIST an entry."""
    if LIST == 0:
        channels = places
    elif LIST == 1:
        channels = tl.load(index + places, mask=mask, other=0)
    else:
        channels = tl.load(index + places // LIST, mask=mask, other=0) * LIST + places % LIST
        # The compiler knows nothing of what a list holds; without this it loads channel by channel.
        channels = tl.max_contiguous(tl.multiple_of(channels, [LIST]), [LIST])
    return channels


@triton.jit
def reaching(first, size, STEP: tl.constexpr, COUNT: tl.constexpr):
    """Bit t of the result: whether the row (or column) first + t * STEP lies within 0 .. size - 1."""
    bits = tl.zeros_like(first)
    for t in tl.static_range(COUNT):
        place = first + t * STEP
        bits |= ((place >= 0) & (place < size)).to(tl.int32) << t
    return bits


@triton.jit
def swizzled_tile(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Row and column of a tile; GROUP_M rows of tiles run side by side, so that they share columns in the L2 cache."""
    first_m = tile // (GROUP_M * tiles_n) * GROUP_M
    rows = tl.minimum(tiles_m - first_m, GROUP_M)
    place = tile % (GROUP_M * tiles_n)
    return first_m + place % rows, place // rows


@triton.jit
def run_of_batch(runs, run):
    """A domain's run of a mixed batch: the first pixel behind it, K_in, where its list and weight are, a row of w.

    Offsets are in elements, from the first run's list and weight: each may have memory of its own.
    """
    place = runs + run * 5
    end = tl.load(place).to(tl.int32)
    K_in = tl.load(place + 1).to(tl.int32)
    weight = tl.multiple_of(tl.load(place + 3), 16)
    row = tl.multiple_of(tl.load(place + 4), 16)
    return end, K_in, tl.load(place + 2), weight, row
