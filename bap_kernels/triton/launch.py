"""From tensors to launches: grids, strides and flags of each kernel.

A builder returns a :class:`Launch`, which holds everything that the launch is made of. Running it and compiling it for
another machine are the same description.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bap_kernels.triton.configs import PACK, Config, behind_a_list, choose
from bap_kernels.triton.forward import gathered_conv2d_fwd_kernel
from bap_kernels.triton.lists import ChannelList
from bap_kernels.triton.pack import channel_pack_kernel
from bap_kernels.triton.planar import gathered_conv2d_planar_fwd_kernel
from bap_kernels.triton.weights import alignment

__all__ = ["Epilogue", "Geometry", "Launch", "Prologue", "Target", "forward", "pack", "planar", "target_of"]


@dataclass(frozen=True)
class Target:
    """What a launch is made for.

    Args:
        capability: compute capability without its point.
        interpreted: whether Triton's interpreter runs it; it has no bfloat16 products.
        tf32: whether products of float32 may be rounded to TF32.
    """

    capability: int
    interpreted: bool = False
    tf32: bool = False

    def products(self, dtype: torch.dtype) -> str:
        """The kind of products, as in the table of configurations."""
        return "16" if dtype.itemsize == 2 else "tf32" if self.tf32 else "ieee"

    def flags(self, dtype: torch.dtype) -> dict[str, Any]:
        """The constants PRECISION and UPCAST."""
        upcast = self.interpreted and dtype == torch.bfloat16
        return {"PRECISION": "tf32" if self.tf32 else "ieee", "UPCAST": upcast}


@functools.cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _tf32_allowed() -> bool:
    try:
        return bool(torch.backends.cudnn.allow_tf32)
    except RuntimeError:
        # The user has set it by the newer name, after which the older one cannot be read.
        return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]


def target_of(device: torch.device) -> Target:
    """The target for tensors on a device; a CPU stands for the interpreter."""
    if device.type == "cpu":
        return Target(80, interpreted=True)
    return Target(_capability(device), tf32=_tf32_allowed())


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel: its arguments in order, its constants and its configuration."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    config: Config = field(default=PACK)

    def run(self) -> None:
        """Runs it on the current stream of the tensors' device, which must be the current one."""
        options = {"num_warps": self.config.warps, "num_stages": self.config.stages}
        self.kernel[self.grid](*self.arguments, **self.constants, **options)


@dataclass(frozen=True)
class Geometry:
    """Sizes and options of a convolution; padding of the top and of the left alone, the rest follows from the sizes."""

    batch: int
    size: tuple[int, int]
    out_size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @property
    def taps(self) -> int:
        """Number of taps, kH * kW."""
        return self.kernel[0] * self.kernel[1]

    @property
    def inside(self) -> bool:
        """Whether no tap of any result leaves the input."""
        return all(
            self.padding[d] == 0
            and (self.out_size[d] - 1) * self.stride[d] + (self.kernel[d] - 1) * self.dilation[d] < self.size[d]
            for d in (0, 1)
        )

    @property
    def constants(self) -> dict[str, int]:
        """The kernels' constants KH to DW."""
        values = (*self.kernel, *self.stride, *self.padding, *self.dilation)
        return dict(zip(("KH", "KW", "SH", "SW", "TOP", "LEFT", "DH", "DW"), values, strict=True))


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
class Epilogue:
    """Transform of the result; ``bias`` is full-size, scale, shift and residual are those of the listed filters."""

    bias: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    residual: Tensor | None = None
    relu: bool = False


NO_PROLOGUE, NO_EPILOGUE = Prologue(), Epilogue()


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


def _fusion_flags(prologue: Prologue, epilogue: Epilogue, count: Tensor | None, full_width: bool) -> dict[str, bool]:
    return {
        "HAS_COUNT": count is not None,
        "HAS_BIAS": epilogue.bias is not None,
        "HAS_IN_SCALE": prologue.scale is not None,
        "HAS_IN_SHIFT": prologue.shift is not None,
        "IN_RELU": prologue.relu,
        "HAS_OUT_SCALE": epilogue.scale is not None,
        "HAS_OUT_SHIFT": epilogue.shift is not None,
        "HAS_RESIDUAL": epilogue.residual is not None,
        "OUT_RELU": epilogue.relu,
        "FULL_WIDTH": full_width,
    }


def _vectors(prologue: Prologue, epilogue: Epilogue) -> tuple[Tensor | None, ...]:
    vectors = (epilogue.bias, prologue.scale, prologue.shift, epilogue.scale, epilogue.shift)
    return (*map(dense_vector, vectors), epilogue.residual)


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
) -> Launch:
    """The implicit GEMM; see :mod:`bap_kernels.triton.forward`.

    Args:
        y: result, (N, K_out, oH, oW), or with ``full_width`` (N, C_out, oH, oW).
        x: (N, C_in, H, W), any strides.
        packed: (K_out, taps, K_in rounded up), see :func:`bap_kernels.triton.weights.pack_weight`.
        count: int32, (1,), on the device: how many channels of ``in_list`` are used; None: all.
    """
    pixels = geometry.batch * math.prod(geometry.out_size)
    config = choose(pixels, out_list.length, target.products(x.dtype), target.capability)
    config = behind_a_list(config) if in_list.kind else config
    arguments = (
        *(x, packed, y, in_list.entries, out_list.entries, count, *_vectors(prologue, epilogue)),
        *(pixels, *geometry.size, *geometry.out_size, in_list.length, out_list.length),
        *(*x.stride(), *packed.stride()[:2], *y.stride(), *strides_or_zeros(epilogue.residual)),
    )
    constants = {
        **geometry.constants,
        **_fusion_flags(prologue, epilogue, count, full_width),
        **target.flags(x.dtype),
        **{"IN_LIST": in_list.kind, "OUT_LIST": out_list.kind, "INSIDE": geometry.inside},
        **{"EVEN_K": count is None and in_list.length % config.BK == 0, "ALIGN_X": pixel_alignment(x)},
        **{"BM": config.BM, "BN": config.BN, "BK": config.BK, "GROUP_M": config.group_m},
    }
    grid = (-(-pixels // config.BM) * -(-out_list.length // config.BN),)
    return Launch(gathered_conv2d_fwd_kernel, grid, arguments, constants, config)


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
) -> Launch:
    """The 1x1 convolution of planes; see :mod:`bap_kernels.triton.planar`. Arguments as :func:`forward`.

    ``x`` and ``y`` have their pixels one element apart, row after row.
    """
    batch, _, height, width = x.shape
    pixels = height * width
    config = choose(out_list.length, batch * pixels, target.products(x.dtype), target.capability)
    config = behind_a_list(config) if in_list.kind else config
    arguments = (
        *(x, packed, y, in_list.entries, out_list.entries, count, *_vectors(prologue, epilogue)),
        *(pixels, width, in_list.length, out_list.length),
        *(*x.stride()[:2], packed.stride(0), *y.stride()[:2], *strides_or_zeros(epilogue.residual)),
    )
    constants = {
        **_fusion_flags(prologue, epilogue, count, full_width),
        **target.flags(x.dtype),
        **{"IN_LIST": in_list.kind, "OUT_LIST": out_list.kind},
        "EVEN_K": count is None and in_list.length % config.BK == 0,
        "ALIGN_X": alignment(pixels, *x.stride()[:2]),
        **{"BM": config.BM, "BN": config.BN, "BK": config.BK, "GROUP_M": config.group_m},
    }
    grid = (-(-out_list.length // config.BM) * -(-pixels // config.BN), batch)
    return Launch(gathered_conv2d_planar_fwd_kernel, grid, arguments, constants, config)


def pack(
    y: Tensor, x: Tensor, in_list: ChannelList, prologue: Prologue = NO_PROLOGUE, count: Tensor | None = None
) -> Launch:
    """The copy of listed channels; see :mod:`bap_kernels.triton.pack`.

    Args:
        y: dense (N, H, W, K rounded up).
        x: (N, C_in, H, W), any strides.
    """
    batch, _, height, width = x.shape
    pixels, padded = height * width, y.shape[3]
    arguments = (
        *(x, y, in_list.entries, count, dense_vector(prologue.scale), dense_vector(prologue.shift)),
        *(pixels, width, in_list.length, padded, *x.stride()),
    )
    flat = height == 1 or x.stride(2) == width * x.stride(3)
    constants = {
        **{"LIST": in_list.kind, "HAS_COUNT": count is not None, "HAS_SCALE": prologue.scale is not None},
        **{"HAS_SHIFT": prologue.shift is not None, "RELU": prologue.relu, "FLAT": flat},
        **{"ALIGN_X": alignment(x.stride(0)), "BM": PACK.BM, "BN": PACK.BN},
    }
    grid = (batch * -(-pixels // PACK.BM) * -(-padded // PACK.BN),)
    return Launch(channel_pack_kernel, grid, arguments, constants)
