"""What a launch is made of: the target, the convolution's sizes, a specification and tensors.

Running a launch and compiling it for another machine start from the same description.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import triton.language as tl
from torch import Tensor

from bap_kernels._load import _C
from bap_kernels.dispatch import interpreting
from bap_kernels.triton.arguments import Conv, Tile
from bap_kernels.triton.configs import PACK, Config

__all__ = [
    "ALIGNMENT",
    "Geometry",
    "Ints",
    "Launch",
    "LaunchSpec",
    "Target",
    "alignment",
    "constants_of",
    "target_of",
    "tile_of",
]

# Elements that the last axis of packed weights and compact copies is rounded up to: whole 128-bit vectors.
ALIGNMENT: int = _C.PACKED_ALIGNMENT

Ints = tuple[int, ...]
# As Triton decided when the kernels were defined.
_INTERPRETED = interpreting()


def alignment(*lengths: int) -> int:
    """The largest power of two up to ``ALIGNMENT`` that divides every length; of none, ``ALIGNMENT``.

    Examples:
        >>> from bap_kernels.triton.launch_spec import alignment
        >>> alignment(24, 64)
        8
    """
    return math.gcd(ALIGNMENT, *lengths)


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

    def math(self, dtype: torch.dtype) -> tuple[str, bool]:
        """The kernels' options PRECISION and UPCAST."""
        return "tf32" if self.tf32 else "ieee", self.interpreted and dtype == torch.bfloat16


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


_Group = TypeVar("_Group", bound=tuple)


def constants_of(group: _Group) -> _Group:
    """A named tuple for a kernel's constant parameter; before Triton 3.8 its members have to be constants, too."""
    return group if _INTERPRETED else type(group)(*map(tl.constexpr, group))


def tile_of(config: Config) -> Tile:
    """The kernels' constant TILE."""
    return constants_of(Tile(config.BM, config.BN, config.BK, config.group_m))


@dataclass(frozen=True, eq=False)
class LaunchSpec:
    """A launch without its tensors.

    Args:
        sizes: the kernel's arguments that follow the tensors: integers, or named tuples of them.
        constants: those that follow the sizes: named tuples from :func:`constants_of`.
        compiled: machine code by device and by what the tensors' memory decides of it.
    """

    kernel: Any
    grid: tuple[int, ...]
    sizes: tuple[Any, ...]
    constants: tuple[Any, ...]
    config: Config = PACK
    compiled: dict[tuple, Any] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, Any]:
        """What the compiler is told besides the constants."""
        # Products and sums in one rounding, as cuDNN has them; from 3.10 on Triton wants to be asked for it.
        return {"num_warps": self.config.warps, "num_stages": self.config.stages, "enable_fp_fusion": True}


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel: a specification, and its tensors in the order of the kernel's arguments.

    Args:
        tensors: each a tensor, a named tuple of them, or None for what the launch does without.
    """

    spec: LaunchSpec
    tensors: tuple[Tensor | tuple[Tensor | None, ...] | None, ...]

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The kernel's arguments in order."""
        return (*self.tensors, *self.spec.sizes, *self.spec.constants)

    def run(self) -> None:
        """Runs it on the current stream of the tensors' device, which must be the current one.

        Triton looks at every argument of every launch to find the machine code; here it is asked once for each
        specification and each pattern of types and of pointers that are multiples of 16 bytes, the only things that
        can differ.
        """
        spec, first = self.spec, self.tensors[0]
        assert isinstance(first, Tensor)
        if _INTERPRETED:
            self.run_by_triton()
            return
        key = (
            first.device.index,
            *[
                None if t is None else (t.dtype, t.data_ptr() % 16 == 0)
                for group in self.tensors
                for t in (group if isinstance(group, tuple) else (group,))
            ],
        )
        code = spec.compiled.get(key)
        if code is None:
            spec.compiled[key] = self.run_by_triton()
        else:
            code[(*spec.grid, 1, 1)[:3]](*self.arguments)

    def run_by_triton(self) -> Any:
        """Runs it as Triton launches kernels, compiling where needed; returns the machine code."""
        spec = self.spec
        return spec.kernel[spec.grid](*self.arguments, **spec.options)


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
    def conv(self) -> Conv:
        """The kernels' constant CONV."""
        return constants_of(Conv(*self.kernel, *self.stride, *self.padding, *self.dilation))
