"""From tensors to launches of the gradients; see :mod:`bap_kernels.triton.launch`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bap_kernels.triton.configs import SUM_BLOCK, architecture, choose, chunks, tiles
from bap_kernels.triton.input_gradient import gathered_conv2d_dgrad_kernel
from bap_kernels.triton.launch import Geometry, Launch, Target, pixel_alignment
from bap_kernels.triton.lists import ChannelList
from bap_kernels.triton.weight_gradient import gathered_conv2d_wgrad_kernel, sum_partials_kernel
from bap_kernels.triton.weights import alignment

__all__ = ["input_gradient", "input_gradient_partials", "sum_partials", "weight_gradient", "weight_gradient_partials"]


def _phase_pixels(geometry: Geometry) -> int:
    return geometry.batch * math.prod(-(-geometry.size[d] // geometry.stride[d]) for d in (0, 1))


def input_gradient_partials(g: Tensor, geometry: Geometry, channels: int, target: Target) -> Tensor:
    """Memory for the terms of a switch's gradient: (blocks of pixels, channels), float32."""
    pixels = _phase_pixels(geometry)
    config = choose(pixels, channels, target.products(g.dtype), target.capability)
    return g.new_empty((math.prod(geometry.stride) * -(-pixels // config.BM), channels), dtype=torch.float32)


def input_gradient(
    g: Tensor,
    packed: Tensor,
    geometry: Geometry,
    in_list: ChannelList,
    target: Target,
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
        dx: (N, C_in, H, W), any strides; the listed channels are written. None: none is.
        x, partial: input, and memory for the terms; None: no terms.
        count: how many channels of the list are stored; None: all.
        reduce_off: whether the terms of the others are wanted.
    """
    pixels = _phase_pixels(geometry)
    config = choose(pixels, in_list.length, target.products(g.dtype), target.capability)
    kept_out = packed.shape[2]
    arguments = (
        *(g, packed, x, dx, partial, in_list.entries, count, pixels, *geometry.size, *geometry.out_size),
        *(in_list.length, g.shape[1], *g.stride(), *packed.stride()[:2]),
        *((0, 0, 0, 0) if x is None else x.stride()),
        *((0, 0, 0, 0) if dx is None else dx.stride()),
    )
    steps = [geometry.stride[d] // math.gcd(geometry.stride[d], geometry.dilation[d]) for d in (0, 1)]
    constants = {
        **geometry.constants,
        **{"STEP_H": steps[0], "STEP_W": steps[1], "IN_LIST": in_list.kind, "HAS_COUNT": count is not None},
        **{"STORE": dx is not None, "REDUCE": partial is not None, "REDUCE_OFF": reduce_off},
        **{"EVEN_K": g.shape[1] == kept_out and kept_out % config.BK == 0, "ALIGN_G": pixel_alignment(g)},
        **target.flags(g.dtype),
        **{"BM": config.BM, "BN": config.BN, "BK": config.BK, "GROUP_M": config.group_m},
    }
    grid = (-(-pixels // config.BM) * -(-in_list.length // config.BN), math.prod(geometry.stride))
    return Launch(gathered_conv2d_dgrad_kernel, grid, arguments, constants, config)


def weight_gradient_partials(g: Tensor, geometry: Geometry, kept_out: int, kept_in: int, target: Target) -> Tensor:
    """Memory for the sums over chunks of pixels: (chunks, K_out, taps, K_in), float32."""
    config = choose(kept_out, kept_in, target.products(g.dtype), target.capability)
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
    count: Tensor | None = None,
) -> Launch:
    """The sums over chunks of pixels; see :mod:`bap_kernels.triton.weight_gradient`.

    Args:
        g: (N, K_out, oH, oW), any strides.
        x: (N, C_in, H, W), any strides.
        count: how many channels of the list are used; None: all.
    """
    pieces, kept_out, _, kept_in = partial.shape
    config = choose(kept_out, kept_in, target.products(g.dtype), target.capability)
    pixels = geometry.batch * math.prod(geometry.out_size)
    length = -(-pixels // (pieces * config.BK)) * config.BK
    arguments = (
        *(g, x, partial, in_list.entries, count, pixels, length, *geometry.size, *geometry.out_size),
        *(kept_in, kept_out, *g.stride(), *x.stride()),
    )
    constants = {
        **geometry.constants,
        **{"IN_LIST": in_list.kind, "HAS_COUNT": count is not None, "INSIDE": geometry.inside},
        # Runs of this many channels are inside or outside as a whole.
        **{"ALIGN_G": alignment(pixel_alignment(g), kept_out), "ALIGN_X": alignment(pixel_alignment(x), kept_in)},
        **target.flags(g.dtype),
        **{"BM": config.BM, "BN": config.BN, "BK": config.BK},
    }
    grid = (geometry.taps * tiles(kept_out, kept_in, config), pieces)
    return Launch(gathered_conv2d_wgrad_kernel, grid, arguments, constants, config)


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
    entries = out_list.length * geometry.taps * in_list.length
    arguments = (
        *(partial, out, in_list.entries, out_list.entries, count, entries, partial.shape[0], in_list.length),
        *(*partial.stride()[:3], *out.stride()),
    )
    constants = {
        **{"KW": geometry.kernel[1], "TAPS": geometry.taps, "IN_LIST": in_list.kind, "OUT_LIST": out_list.kind},
        **{"HAS_COUNT": count is not None, "BLOCK": SUM_BLOCK},
    }
    return Launch(sum_partials_kernel, (-(-entries // SUM_BLOCK),), arguments, constants)
