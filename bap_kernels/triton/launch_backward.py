"""From tensors to launches of the gradients; see :mod:`bap_kernels.triton.launch`."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from bap_kernels.triton.configs import SUM_BLOCK, Config, Problem, architecture, chunks, tiles
from bap_kernels.triton.input_gradient import gathered_conv2d_dgrad_kernel
from bap_kernels.triton.launch import pixel_alignment
from bap_kernels.triton.lists import ChannelList
from bap_kernels.triton.recipe import Geometry, Ints, Launch, Recipe, Target, ordered
from bap_kernels.triton.weight_gradient import gathered_conv2d_wgrad_kernel, sum_partials_kernel
from bap_kernels.triton.weights import alignment

__all__ = [
    "input_gradient",
    "input_gradient_partials",
    "input_gradient_problem",
    "sum_partials",
    "weight_gradient",
    "weight_gradient_partials",
    "weight_gradient_problem",
]


def _phase_pixels(geometry: Geometry) -> int:
    return geometry.batch * math.prod(-(-geometry.size[d] // geometry.stride[d]) for d in (0, 1))


def input_gradient_problem(g: Tensor, geometry: Geometry, in_list: ChannelList, reduced: bool = False) -> Problem:
    """What the configuration of :func:`input_gradient` is chosen for."""
    name = "dgrad reduced" if reduced else "dgrad"
    phases = math.prod(geometry.stride)
    return Problem(name, _phase_pixels(geometry), in_list.length, g.shape[1], geometry.taps, in_list.kind, phases)


def input_gradient_partials(g: Tensor, geometry: Geometry, channels: int, config: Config) -> Tensor:
    """Memory for the terms of a switch's gradient: (blocks of pixels, channels), float32."""
    pixels = _phase_pixels(geometry)
    return g.new_empty((math.prod(geometry.stride) * -(-pixels // config.BM), channels), dtype=torch.float32)


def input_gradient(
    g: Tensor,
    packed: Tensor,
    geometry: Geometry,
    in_list: ChannelList,
    target: Target,
    config: Config,
    dx: Tensor | None = None,
    x: Tensor | None = None,
    partial: Tensor | None = None,
    count: Tensor | None = None,
    reduce_off: bool = False,
) -> Launch:
    """The input's gradient, and the terms of a switch's; see :mod:`bap_kernels.triton.input_gradient`.

    Args:
        g: gradient of the result, (N, K_out, oH, oW), any strides.
        packed: (K_in, taps, K_out rounded up).
        config: that of ``partial``, too.
        dx: (N, C_in, H, W), any strides; the listed channels are written. None: none is.
        x, partial: input, and memory for the terms; None: no terms.
        count: how many channels of the list are stored; None: all.
        reduce_off: whether the terms of the others are wanted.
    """
    flags = (count is not None, dx is not None, partial is not None, reduce_off)
    none = (0, 0, 0, 0)
    strides = (
        *(g.stride(), packed.stride()[:2]),
        *(none if x is None else x.stride(), none if dx is None else dx.stride()),
    )
    lengths = (in_list.length, g.shape[1], packed.shape[2])
    recipe = _input_gradient_recipe(
        *(config, target, geometry, g.dtype, in_list.kind, lengths, flags, strides, pixel_alignment(g))
    )
    return Launch(recipe, (g, packed, x, dx, partial, in_list.entries, count))


@functools.lru_cache(maxsize=4096)
def _input_gradient_recipe(
    config: Config,
    target: Target,
    geometry: Geometry,
    dtype: torch.dtype,
    kind: int,
    lengths: Ints,
    flags: tuple[bool, ...],
    strides: tuple[Ints, ...],
    align: int,
) -> Recipe:
    pixels = _phase_pixels(geometry)
    K_in, K_out, kept_out = lengths
    steps = [geometry.stride[d] // math.gcd(geometry.stride[d], geometry.dilation[d]) for d in (0, 1)]
    constants = {
        **geometry.constants,
        **dict(zip(("HAS_COUNT", "STORE", "REDUCE", "REDUCE_OFF"), flags, strict=True)),
        **{"STEP_H": steps[0], "STEP_W": steps[1], "IN_LIST": kind, "ALIGN_G": align},
        **{"EVEN_K": K_out == kept_out and kept_out % config.BK == 0},
        **target.flags(dtype),
        **{"BM": config.BM, "BN": config.BN, "BK": config.BK, "GROUP_M": config.group_m},
    }
    grid = (-(-pixels // config.BM) * -(-K_in // config.BN), math.prod(geometry.stride))
    sizes = (pixels, *geometry.size, *geometry.out_size, K_in, K_out, *(s for each in strides for s in each))
    kernel = gathered_conv2d_dgrad_kernel
    return Recipe(kernel, grid, sizes, ordered(kernel, constants), config)


def weight_gradient_problem(geometry: Geometry, kept_out: int, in_list: ChannelList) -> Problem:
    """What the configuration of :func:`weight_gradient` is chosen for."""
    pixels = geometry.batch * math.prod(geometry.out_size)
    return Problem("wgrad", kept_out, in_list.length, pixels, geometry.taps, in_list.kind)


def weight_gradient_partials(
    g: Tensor, geometry: Geometry, kept_out: int, kept_in: int, target: Target, config: Config
) -> Tensor:
    """Memory for the sums over chunks of pixels: (chunks, K_out, taps, K_in), float32."""
    tile_count = geometry.taps * tiles(kept_out, kept_in, config)
    pixels = geometry.batch * math.prod(geometry.out_size)
    count, _ = chunks(pixels, tile_count, config.BK, architecture(target.capability).processors)
    return g.new_empty((count, kept_out, geometry.taps, kept_in), dtype=torch.float32)


def weight_gradient(
    partial: Tensor,
    g: Tensor,
    x: Tensor,
    geometry: Geometry,
    in_list: ChannelList,
    target: Target,
    config: Config,
    count: Tensor | None = None,
) -> Launch:
    """The sums over chunks of pixels; see :mod:`bap_kernels.triton.weight_gradient`.

    Args:
        g: (N, K_out, oH, oW), any strides.
        x: (N, C_in, H, W), any strides.
        config: that of ``partial``, too.
        count: how many channels of the list are used; None: all.
    """
    pieces, kept_out, _, kept_in = partial.shape
    # Runs of this many channels are inside or outside as a whole.
    aligns = (alignment(pixel_alignment(g), kept_out), alignment(pixel_alignment(x), kept_in))
    recipe = _weight_gradient_recipe(
        *(config, target, geometry, g.dtype, in_list.kind, (pieces, kept_out, kept_in), count is not None),
        *((g.stride(), x.stride()), aligns),
    )
    return Launch(recipe, (g, x, partial, in_list.entries, count))


@functools.lru_cache(maxsize=4096)
def _weight_gradient_recipe(
    config: Config,
    target: Target,
    geometry: Geometry,
    dtype: torch.dtype,
    kind: int,
    lengths: Ints,
    has_count: bool,
    strides: tuple[Ints, Ints],
    aligns: Ints,
) -> Recipe:
    pieces, kept_out, kept_in = lengths
    pixels = geometry.batch * math.prod(geometry.out_size)
    length = -(-pixels // (pieces * config.BK)) * config.BK
    constants = {
        **geometry.constants,
        **{"IN_LIST": kind, "HAS_COUNT": has_count, "INSIDE": geometry.inside},
        **{"ALIGN_G": aligns[0], "ALIGN_X": aligns[1]},
        **target.flags(dtype),
        **{"BM": config.BM, "BN": config.BN, "BK": config.BK},
    }
    grid = (geometry.taps * tiles(kept_out, kept_in, config), pieces)
    sizes = (pixels, length, *geometry.size, *geometry.out_size, kept_in, kept_out, *strides[0], *strides[1])
    kernel = gathered_conv2d_wgrad_kernel
    return Recipe(kernel, grid, sizes, ordered(kernel, constants), config)


def sum_partials(
    out: Tensor,
    partial: Tensor,
    geometry: Geometry,
    in_list: ChannelList,
    out_list: ChannelList,
    count: Tensor | None = None,
) -> Launch:
    """Adds the chunks in order and puts the sums at the listed places of ``out`` (C_out, C_in, kH, kW).

    Args:
        partial: (chunks, at least K_out, taps, at least K_in).
    """
    recipe = _sum_recipe(
        *(geometry.kernel, (in_list.kind, out_list.kind), (in_list.length, out_list.length), count is not None),
        *(partial.shape[0], (*partial.stride()[:3], *out.stride())),
    )
    return Launch(recipe, (partial, out, in_list.entries, out_list.entries, count))


@functools.lru_cache(maxsize=4096)
def _sum_recipe(kernel: Ints, lists: Ints, lengths: Ints, has_count: bool, pieces: int, strides: Ints) -> Recipe:
    entries = math.prod(kernel) * math.prod(lengths)
    constants = {
        **{"KW": kernel[1], "TAPS": math.prod(kernel), "IN_LIST": lists[0], "OUT_LIST": lists[1]},
        **{"HAS_COUNT": has_count, "BLOCK": SUM_BLOCK},
    }
    grid = (-(-entries // SUM_BLOCK),)
    sizes = (entries, pieces, lengths[0], *strides)
    return Recipe(sum_partials_kernel, grid, sizes, ordered(sum_partials_kernel, constants))
