"""From tensors to launches: grids, strides and constants of the forward kernels.

A builder returns a :class:`Launch`. What does not depend on the tensors' memory is its :class:`LaunchSpec`, made once
for each case and kept.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bap_kernels.triton.arguments import (
    EpilogueTensors,
    ForwardOptions,
    ForwardStrides,
    Lists,
    Mixed,
    PrologueTensors,
    Sizes,
    Strides,
    WeightStrides,
)
from bap_kernels.triton.configs import PACK, Config, Problem, behind_a_list, choose, within_registers
from bap_kernels.triton.forward import gathered_conv2d_fwd_kernel
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
from bap_kernels.triton.pack import PackOptions, PackSizes, channel_pack_kernel
from bap_kernels.triton.planar import gathered_conv2d_planar_fwd_kernel

__all__ = [
    "DualStore",
    "Epilogue",
    "Prologue",
    "config_of",
    "forward",
    "forward_problem",
    "pack",
    "planar",
    "planar_problem",
]


def _dense(vector: Tensor | None) -> Tensor | None:
    # The kernels read neighbouring elements.
    return None if vector is None else vector.contiguous()


@dataclass(frozen=True)
class Prologue:
    """Transform of the listed channels that are read."""

    scale: Tensor | None = None
    shift: Tensor | None = None
    relu: bool = False

    @property
    def tensors(self) -> PrologueTensors:
        """As the kernels take it."""
        return PrologueTensors(_dense(self.scale), _dense(self.shift))


@dataclass(frozen=True)
class DualStore:
    """A second, compact store of some channels of the result.

    Args:
        tensor: (N, K, oH, oW), in the result's memory format.
        channels: int32, (K_out,): each filter's channel of ``tensor``, or -1; see
            ``inverse_list`` in csrc/dispatch/list_form.h.
    """

    tensor: Tensor
    channels: Tensor


@dataclass(frozen=True)
class Epilogue:
    """Transform of the result; ``bias`` is full-size, scale, shift and residual are those of the listed filters."""

    bias: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    residual: Tensor | None = None
    relu: bool = False
    dual: DualStore | None = None

    @property
    def tensors(self) -> EpilogueTensors:
        """As the kernels take it."""
        dual = (None, None) if self.dual is None else (self.dual.tensor, self.dual.channels)
        return EpilogueTensors(_dense(self.bias), _dense(self.scale), _dense(self.shift), self.residual, *dual)


NO_PROLOGUE, NO_EPILOGUE = Prologue(), Epilogue()


def stride_or_zeros(tensor: Tensor | None) -> Ints:
    """The four strides; zeros where there is no tensor."""
    return (0, 0, 0, 0) if tensor is None else tensor.stride()


def pixel_alignment(x: Tensor) -> int:
    """What divides all offsets of pixels, in elements, where channels are contiguous; else 1."""
    n, c, h, w = x.stride()
    return alignment(n, h, w) if c == 1 else 1


def _stride_key(x: Tensor, packed: Tensor, y: Tensor, epilogue: Epilogue) -> tuple[Ints, ...]:
    dual = None if epilogue.dual is None else epilogue.dual.tensor
    return x.stride(), packed.stride()[:2], y.stride(), stride_or_zeros(epilogue.residual), stride_or_zeros(dual)


def _named_strides(x: Ints, w: Ints, y: Ints, residual: Ints, dual: Ints) -> ForwardStrides:
    return ForwardStrides(Strides(*x), WeightStrides(*w), Strides(*y), Strides(*residual), Strides(*dual))


def forward_problem(geometry: Geometry, in_list: ChannelList, kept_out: int) -> Problem:
    """What the configuration of :func:`forward` is chosen for."""
    pixels = geometry.batch * math.prod(geometry.out_size)
    return Problem("fwd", pixels, kept_out, in_list.length, geometry.taps, in_list.kind)


def planar_problem(x: Tensor, in_list: ChannelList, kept_out: int) -> Problem:
    """What the configuration of :func:`planar` is chosen for."""
    return Problem("planar", kept_out, x.shape[0] * x.shape[2] * x.shape[3], in_list.length, 1, in_list.kind)


def config_of(problem: Problem, dtype: torch.dtype, target: Target, epilogue: Epilogue = NO_EPILOGUE) -> Config:
    """The configuration of a forward kernel."""
    config = choose(problem, target.products(dtype), target.capability)
    if epilogue.residual is not None or epilogue.dual is not None:
        # Larger ones spill; a second store in NHWC has an address of its own for each of its elements.
        # So do elements of 4 bytes.
        tight = problem.kernel == "fwd" and (epilogue.dual is not None or dtype.itemsize == 4)
        config = within_registers(config, 32 if tight else 64)
    return behind_a_list(config) if problem.kind else config


@functools.lru_cache(maxsize=4096)
def _forward_spec(
    config: Config,
    target: Target,
    geometry: Geometry,
    dtype: torch.dtype,
    kinds: tuple[int, int],
    lengths: tuple[int, int],
    flags: tuple[bool, bool, bool],
    strides: tuple[Ints, ...],
    align: int,
    whole: bool,
    tile_count: int | None,
) -> LaunchSpec:
    K_in, K_out = lengths
    pixels = geometry.batch * math.prod(geometry.out_size)
    sizes = Sizes(pixels, *geometry.size, *geometry.out_size, K_in, K_out)
    even = whole and K_in % config.BK == 0
    options = ForwardOptions(*kinds, *flags, geometry.inside, even, align, *target.math(dtype))
    grid = ((tile_count or -(-pixels // config.BM)) * -(-K_out // config.BN),)
    constants = (geometry.conv, constants_of(options), tile_of(config))
    return LaunchSpec(gathered_conv2d_fwd_kernel, grid, (sizes, _named_strides(*strides)), constants, config)


def forward(
    y: Tensor,
    x: Tensor,
    packed: Tensor,
    geometry: Geometry,
    in_list: ChannelList,
    out_list: ChannelList,
    target: Target,
    prologue: Prologue = NO_PROLOGUE,
    epilogue: Epilogue = NO_EPILOGUE,
    count: Tensor | None = None,
    full_width: bool = False,
    mixed: Mixed | None = None,
) -> Launch:
    """The implicit GEMM; see :mod:`bap_kernels.triton.forward`.

    Args:
        y: result, (N, K_out, oH, oW), or with ``full_width`` (N, C_out, oH, oW).
        x: (N, C_in, H, W), any strides.
        packed: (K_out, taps, K_in rounded up), see csrc/dispatch/pack_weight.h; of a mixed batch that of the
            first run.
        in_list: of a mixed batch that of the first run, with the kind of all and the greatest length.
        count: int32, (1,), on the device: how many channels of ``in_list`` are used; None: all.
        mixed: the runs of a mixed batch, whose tiles begin at pixels.
    """
    config = config_of(forward_problem(geometry, in_list, out_list.length), x.dtype, target, epilogue)
    spec = _forward_spec(
        *(config, target, geometry, x.dtype, (in_list.kind, out_list.kind), (in_list.length, out_list.length)),
        *((prologue.relu, epilogue.relu, full_width), _stride_key(x, packed, y, epilogue), pixel_alignment(x)),
        *(mixed is None and count is None, None if mixed is None else mixed.tiles.shape[0]),
    )
    lists = Lists(in_list.entries, out_list.entries, count)
    return Launch(spec, (x, packed, y, lists, prologue.tensors, epilogue.tensors, mixed))


@functools.lru_cache(maxsize=4096)
def _planar_spec(
    config: Config,
    target: Target,
    shape: Ints,
    dtype: torch.dtype,
    kinds: tuple[int, int],
    lengths: tuple[int, int],
    flags: tuple[bool, bool, bool],
    strides: tuple[Ints, ...],
    whole: bool,
) -> LaunchSpec:
    K_in, K_out = lengths
    batch, _, height, width = shape
    pixels = height * width
    named = _named_strides(*strides)
    even, align = whole and K_in % config.BK == 0, alignment(pixels, named.x.n, named.x.c)
    options = ForwardOptions(*kinds, *flags, True, even, align, *target.math(dtype))
    grid = (-(-K_out // config.BM) * -(-pixels // config.BN), batch)
    sizes = Sizes(pixels, height, width, height, width, K_in, K_out)
    constants = (constants_of(options), tile_of(config))
    return LaunchSpec(gathered_conv2d_planar_fwd_kernel, grid, (sizes, named), constants, config)


def planar(
    y: Tensor,
    x: Tensor,
    packed: Tensor,
    in_list: ChannelList,
    out_list: ChannelList,
    target: Target,
    prologue: Prologue = NO_PROLOGUE,
    epilogue: Epilogue = NO_EPILOGUE,
    count: Tensor | None = None,
    full_width: bool = False,
    mixed: Mixed | None = None,
) -> Launch:
    """The 1x1 convolution of planes; see :mod:`bap_kernels.triton.planar`. Arguments as :func:`forward`.

    ``x`` and ``y`` have their pixels one element apart, row after row; the tiles of a mixed batch are its images.
    """
    config = config_of(planar_problem(x, in_list, out_list.length), x.dtype, target, epilogue)
    spec = _planar_spec(
        *(config, target, x.shape, x.dtype, (in_list.kind, out_list.kind), (in_list.length, out_list.length)),
        *((prologue.relu, epilogue.relu, full_width), _stride_key(x, packed, y, epilogue)),
        mixed is None and count is None,
    )
    lists = Lists(in_list.entries, out_list.entries, count)
    return Launch(spec, (x, packed, y, lists, prologue.tensors, epilogue.tensors, mixed))


@functools.lru_cache(maxsize=4096)
def _pack_spec(shape: Ints, strides: Ints, padded: int, kind: int, length: int, relu: bool) -> LaunchSpec:
    batch, _, height, width = shape
    pixels = height * width
    flat = height == 1 or strides[2] == width * strides[3]
    options = PackOptions(kind, relu, flat, alignment(strides[0]), PACK.BM, PACK.BN)
    grid = (batch * -(-pixels // PACK.BM) * -(-padded // PACK.BN),)
    sizes = (PackSizes(pixels, width, length, padded), Strides(*strides))
    return LaunchSpec(channel_pack_kernel, grid, sizes, (constants_of(options),))


def pack(
    y: Tensor,
    x: Tensor,
    in_list: ChannelList,
    prologue: Prologue = NO_PROLOGUE,
    count: Tensor | None = None,
    mixed: Mixed | None = None,
) -> Launch:
    """The copy of listed channels; see :mod:`bap_kernels.triton.pack`.

    Args:
        y: dense (N, H, W, K rounded up).
        x: (N, C_in, H, W), any strides.
        mixed: the runs of a mixed batch, whose tiles are its images; ``in_list`` is that of the first run.
    """
    spec = _pack_spec(x.shape, x.stride(), y.shape[3], in_list.kind, in_list.length, prologue.relu)
    return Launch(spec, (x, y, in_list.entries, count, prologue.tensors, mixed))
