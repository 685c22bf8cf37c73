"""From tensors to launches: grids, strides and flags of the forward kernels.

A builder returns a :class:`Launch`. What does not depend on the tensors' memory is its :class:`Recipe`, made once for
each case and kept.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bap_kernels.triton.configs import PACK, Config, Problem, behind_a_list, choose, within_registers
from bap_kernels.triton.forward import gathered_conv2d_fwd_kernel
from bap_kernels.triton.lists import ChannelList
from bap_kernels.triton.pack import channel_pack_kernel
from bap_kernels.triton.planar import gathered_conv2d_planar_fwd_kernel
from bap_kernels.triton.recipe import Geometry, Ints, Launch, Recipe, Target, ordered
from bap_kernels.triton.weights import alignment

__all__ = [
    "Copy",
    "Epilogue",
    "Mixed",
    "Prologue",
    "config_of",
    "forward",
    "forward_problem",
    "pack",
    "planar",
    "planar_problem",
]


@dataclass(frozen=True)
class Prologue:
    """Transform of the listed channels that are read."""

    scale: Tensor | None = None
    shift: Tensor | None = None
    relu: bool = False

    @property
    def empty(self) -> bool:
        """Whether there is nothing to do."""
        return self.scale is None and self.shift is None and not self.relu


@dataclass(frozen=True)
class Copy:
    """A second, compact store of some channels of the result.

    Args:
        tensor: (N, K, oH, oW), in the result's memory format.
        places: int32, (K_out,): each filter's channel of ``tensor``, or -1; see
            :func:`bap_kernels.triton.lists.places_of`.
    """

    tensor: Tensor
    places: Tensor


@dataclass(frozen=True)
class Epilogue:
    """Transform of the result; ``bias`` is full-size, scale, shift and residual are those of the listed filters."""

    bias: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    residual: Tensor | None = None
    relu: bool = False
    copy: Copy | None = None


NO_PROLOGUE, NO_EPILOGUE = Prologue(), Epilogue()


@dataclass(frozen=True)
class Mixed:
    """The runs of a mixed batch, on the device; see :func:`bap_kernels.triton.device.run_of_batch`.

    Args:
        runs: int64, (runs, 5).
        tiles: int64, (tiles, 2): where each tile begins, a pixel or an image, and its run.
    """

    runs: Tensor
    tiles: Tensor


def dense_vector(vector: Tensor | None) -> Tensor | None:
    """A per-channel vector with neighbouring elements."""
    return None if vector is None else vector.contiguous()


def strides_or_zeros(tensor: Tensor | None) -> Sequence[int]:
    """The four strides, zeros where there is no tensor."""
    return (0, 0, 0, 0) if tensor is None else tensor.stride()


def pixel_alignment(x: Tensor) -> int:
    """What divides all offsets of pixels, in elements, where channels are contiguous; else 1."""
    n, c, h, w = x.stride()
    return alignment(n, h, w) if c == 1 else 1


def _flags(
    prologue: Prologue, epilogue: Epilogue, mixed: Mixed | None, count: Tensor | None, full_width: bool
) -> tuple[bool, ...]:
    return (
        *(mixed is not None, count is not None, epilogue.bias is not None),
        *(prologue.scale is not None, prologue.shift is not None, prologue.relu),
        *(epilogue.scale is not None, epilogue.shift is not None, epilogue.residual is not None, epilogue.relu),
        *(full_width, epilogue.copy is not None),
    )


_FLAGS = (
    *("MIXED", "HAS_COUNT", "HAS_BIAS", "HAS_IN_SCALE", "HAS_IN_SHIFT", "IN_RELU"),
    *("HAS_OUT_SCALE", "HAS_OUT_SHIFT", "HAS_RESIDUAL", "OUT_RELU", "FULL_WIDTH", "HAS_COPY"),
)


def _tensors(prologue: Prologue, epilogue: Epilogue, mixed: Mixed | None) -> tuple[Tensor | None, ...]:
    vectors = (epilogue.bias, prologue.scale, prologue.shift, epilogue.scale, epilogue.shift)
    copy = (None, None) if epilogue.copy is None else (epilogue.copy.tensor, epilogue.copy.places)
    tables = (None, None) if mixed is None else (mixed.runs, mixed.tiles)
    return (*map(dense_vector, vectors), epilogue.residual, *copy, *tables)


def _strides_around(epilogue: Epilogue) -> tuple[Ints, Ints]:
    copy = None if epilogue.copy is None else epilogue.copy.tensor
    return tuple(strides_or_zeros(epilogue.residual)), tuple(strides_or_zeros(copy))


@functools.lru_cache(maxsize=4096)
def _forward_recipe(
    config: Config,
    target: Target,
    geometry: Geometry,
    dtype: torch.dtype,
    lists: Ints,
    lengths: Ints,
    flags: tuple[bool, ...],
    strides: tuple[Ints, ...],
    align: int,
    entries: int | None,
) -> Recipe:
    pixels = geometry.batch * math.prod(geometry.out_size)
    sizes = (pixels, *geometry.size, *geometry.out_size, *lengths, *itertools.chain(*strides))
    whole = not (flags[0] or flags[1]) and lengths[0] % config.BK == 0
    constants = {
        **geometry.constants,
        **dict(zip(_FLAGS, flags, strict=True)),
        **target.flags(dtype),
        **{"IN_LIST": lists[0], "OUT_LIST": lists[1], "INSIDE": geometry.inside, "EVEN_K": whole, "ALIGN_X": align},
        **{"BM": config.BM, "BN": config.BN, "BK": config.BK, "GROUP_M": config.group_m},
    }
    grid = ((entries or -(-pixels // config.BM)) * -(-lengths[1] // config.BN),)
    kernel = gathered_conv2d_fwd_kernel
    return Recipe(kernel, grid, sizes, ordered(kernel, constants), config)


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
    if epilogue.residual is not None or epilogue.copy is not None:
        # Larger ones spill; a copy in NHWC has an address of its own for each of its elements.
        # So do words of 4 bytes.
        tight = problem.kernel == "fwd" and (epilogue.copy is not None or dtype.itemsize == 4)
        config = within_registers(config, 32 if tight else 64)
    return behind_a_list(config) if problem.kind else config


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
        packed: (K_out, taps, K_in rounded up), see :func:`bap_kernels.triton.weights.pack_weight`; of a mixed batch
            that of the first run.
        in_list: of a mixed batch that of the first run, with the kind of all and the greatest length.
        count: int32, (1,), on the device: how many channels of ``in_list`` are used; None: all.
        mixed: the runs of a mixed batch, whose tiles begin at pixels.
    """
    config = config_of(forward_problem(geometry, in_list, out_list.length), x.dtype, target, epilogue)
    strides = (x.stride(), packed.stride()[:2], y.stride(), *_strides_around(epilogue))
    recipe = _forward_recipe(
        *(config, target, geometry, x.dtype, (in_list.kind, out_list.kind), (in_list.length, out_list.length)),
        *(_flags(prologue, epilogue, mixed, count, full_width), strides, pixel_alignment(x)),
        None if mixed is None else mixed.tiles.shape[0],
    )
    tensors = (x, packed, y, in_list.entries, out_list.entries, count, *_tensors(prologue, epilogue, mixed))
    return Launch(recipe, tensors)


@functools.lru_cache(maxsize=4096)
def _planar_recipe(
    config: Config,
    target: Target,
    shape: Ints,
    dtype: torch.dtype,
    lists: Ints,
    lengths: Ints,
    flags: tuple[bool, ...],
    strides: tuple[Ints, ...],
) -> Recipe:
    batch, _, height, width = shape
    pixels = height * width
    whole = not (flags[0] or flags[1]) and lengths[0] % config.BK == 0
    constants = {
        **dict(zip(_FLAGS, flags, strict=True)),
        **target.flags(dtype),
        **{"IN_LIST": lists[0], "OUT_LIST": lists[1], "EVEN_K": whole, "ALIGN_X": alignment(pixels, *strides[0])},
        **{"BM": config.BM, "BN": config.BN, "BK": config.BK, "GROUP_M": config.group_m},
    }
    grid = (-(-lengths[1] // config.BM) * -(-pixels // config.BN), batch)
    kernel = gathered_conv2d_planar_fwd_kernel
    sizes = (pixels, width, *lengths, *itertools.chain(*strides))
    return Recipe(kernel, grid, sizes, ordered(kernel, constants), config)


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
    residual, copy = _strides_around(epilogue)
    strides = (x.stride()[:2], packed.stride()[:1], y.stride()[:2], residual, copy[:2])
    recipe = _planar_recipe(
        *(config, target, x.shape, x.dtype, (in_list.kind, out_list.kind), (in_list.length, out_list.length)),
        *(_flags(prologue, epilogue, mixed, count, full_width), strides),
    )
    tensors = (x, packed, y, in_list.entries, out_list.entries, count, *_tensors(prologue, epilogue, mixed))
    return Launch(recipe, tensors)


@functools.lru_cache(maxsize=4096)
def _pack_recipe(shape: Ints, strides: Ints, padded: int, kind: int, length: int, flags: tuple[bool, ...]) -> Recipe:
    batch, _, height, width = shape
    pixels = height * width
    flat = height == 1 or strides[2] == width * strides[3]
    constants = {
        **dict(zip(("MIXED", "HAS_COUNT", "HAS_SCALE", "HAS_SHIFT", "RELU"), flags, strict=True)),
        **{"LIST": kind, "FLAT": flat, "ALIGN_X": alignment(strides[0]), "BM": PACK.BM, "BN": PACK.BN},
    }
    grid = (batch * -(-pixels // PACK.BM) * -(-padded // PACK.BN),)
    sizes = (pixels, width, length, padded, *strides)
    return Recipe(channel_pack_kernel, grid, sizes, ordered(channel_pack_kernel, constants))


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
    flags = (
        mixed is not None,
        count is not None,
        prologue.scale is not None,
        prologue.shift is not None,
        prologue.relu,
    )
    recipe = _pack_recipe(x.shape, x.stride(), y.shape[3], in_list.kind, in_list.length, flags)
    tables = (None, None) if mixed is None else (mixed.runs, mixed.tiles)
    vectors = (dense_vector(prologue.scale), dense_vector(prologue.shift))
    return Launch(recipe, (x, y, in_list.entries, count, *vectors, *tables))
