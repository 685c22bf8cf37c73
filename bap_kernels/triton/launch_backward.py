"""From tensors to launches of the gradients; see :mod:`bap_kernels.triton.launch`."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from bap_kernels.triton.arguments import Lists, Sizes, Strides, WeightStrides
from bap_kernels.triton.configs import SUM_BLOCK, Config, Problem, architecture, chunks, tiles
from bap_kernels.triton.input_gradient import (
    InputGradientOptions,
    InputGradientStrides,
    gathered_conv2d_dgrad_kernel,
)
from bap_kernels.triton.launch import pixel_alignment, stride_or_zeros
from bap_kernels.triton.launch_spec import (
    Geometry,
    Ints,
    Launch,
    LaunchSpec,
    Target,
    alignment,
    constants_of,
    tile_of,
)
from bap_kernels.triton.lists import ChannelList
from bap_kernels.triton.weight_gradient import (
    SumOptions,
    SumSizes,
    SumStrides,
    WeightGradientOptions,
    WeightGradientStrides,
    gathered_conv2d_wgrad_kernel,
    sum_partials_kernel,
)

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
    strides = (
        *(g.stride(), packed.stride()[:2]),
        *(stride_or_zeros(x), stride_or_zeros(dx)),
    )
    lengths = (in_list.length, g.shape[1], packed.shape[2])
    spec = _input_gradient_spec(
        *(config, target, geometry, g.dtype, in_list.kind, lengths, reduce_off, strides, pixel_alignment(g))
    )
    return Launch(spec, (g, packed, x, dx, partial, in_list.entries, count))


@functools.lru_cache(maxsize=4096)
def _input_gradient_spec(
    config: Config,
    target: Target,
    geometry: Geometry,
    dtype: torch.dtype,
    kind: int,
    lengths: Ints,
    reduce_off: bool,
    strides: tuple[Ints, ...],
    align: int,
) -> LaunchSpec:
    pixels = _phase_pixels(geometry)
    K_in, K_out, padded_out = lengths
    step_h, step_w = (geometry.stride[d] // math.gcd(geometry.stride[d], geometry.dilation[d]) for d in (0, 1))
    even = K_out == padded_out and padded_out % config.BK == 0
    options = InputGradientOptions(step_h, step_w, kind, reduce_off, even, align, *target.math(dtype))
    g, w, x, dx = strides
    named = InputGradientStrides(Strides(*g), WeightStrides(*w), Strides(*x), Strides(*dx))
    grid = (-(-pixels // config.BM) * -(-K_in // config.BN), math.prod(geometry.stride))
    sizes = Sizes(pixels, *geometry.size, *geometry.out_size, K_in, K_out)
    constants = (geometry.conv, constants_of(options), tile_of(config))
    return LaunchSpec(gathered_conv2d_dgrad_kernel, grid, (sizes, named), constants, config)


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
    count, _ = chunks(pixels, tile_count, config.BK, architecture(target.capability).sm_count)
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
    spec = _weight_gradient_spec(
        *(config, target, geometry, g.dtype, in_list.kind, (pieces, kept_out, kept_in), g.stride(), x.stride(), aligns)
    )
    return Launch(spec, (g, x, partial, in_list.entries, count))


@functools.lru_cache(maxsize=4096)
def _weight_gradient_spec(
    config: Config,
    target: Target,
    geometry: Geometry,
    dtype: torch.dtype,
    kind: int,
    lengths: Ints,
    g_strides: Ints,
    x_strides: Ints,
    aligns: tuple[int, int],
) -> LaunchSpec:
    pieces, kept_out, kept_in = lengths
    pixels = geometry.batch * math.prod(geometry.out_size)
    chunk = -(-pixels // (pieces * config.BK)) * config.BK
    options = WeightGradientOptions(kind, geometry.inside, *aligns, *target.math(dtype))
    grid = (geometry.taps * tiles(kept_out, kept_in, config), pieces)
    sizes = Sizes(pixels, *geometry.size, *geometry.out_size, kept_in, kept_out)
    strides = WeightGradientStrides(Strides(*g_strides), Strides(*x_strides))
    constants = (geometry.conv, constants_of(options), tile_of(config))
    return LaunchSpec(gathered_conv2d_wgrad_kernel, grid, (chunk, sizes, strides), constants, config)


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
    spec = _sum_spec(
        *(geometry.kernel, (in_list.kind, out_list.kind), (in_list.length, out_list.length)),
        *(partial.shape[0], partial.stride(), out.stride()),
    )
    return Launch(spec, (partial, out, Lists(in_list.entries, out_list.entries, count)))


@functools.lru_cache(maxsize=4096)
def _sum_spec(
    kernel: tuple[int, int],
    kinds: tuple[int, int],
    lengths: tuple[int, int],
    pieces: int,
    strides: Ints,
    out_strides: Ints,
) -> LaunchSpec:
    entries = math.prod(kernel) * math.prod(lengths)
    options = SumOptions(kernel[1], math.prod(kernel), *kinds, SUM_BLOCK)
    sizes = (
        SumSizes(entries, pieces, lengths[0]),
        SumStrides(strides[0], strides[1], strides[2], Strides(*out_strides)),
    )
    return LaunchSpec(sum_partials_kernel, (-(-entries // SUM_BLOCK),), sizes, (constants_of(options),))
