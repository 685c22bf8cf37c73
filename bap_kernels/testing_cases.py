"""Cases of the ops: shapes, options, lists and layouts, and the tensors that they stand for."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bap_kernels import reference

__all__ = [
    "LAYOUTS",
    "LISTS",
    "Case",
    "Sample",
    "index_list",
    "lay_out",
    "make_fused",
    "make_tensors",
    "moved",
    "poison",
    "random_case",
    "unlisted",
]

# "null" is no list at all; "zero" an empty one; "odd" an odd number of channels; "shuffled" the same out of order.
LISTS = ("null", "zero", "one", "odd", "all", "shuffled")
LAYOUTS = ("contiguous", "channels_last", "sliced", "sliced_last", "stepped", "expanded", "transposed")


@dataclass(frozen=True)
class Case:
    """One problem for the ops: shapes, options, lists and layouts; ``seed`` fixes every number in it.

    Args:
        kernel, stride, dilation: (rows, columns).
        padding: (top, bottom, left, right).
        depthwise: one filter per channel; ``out_channels`` and ``out_list`` are those of the input.
        in_list, out_list: one of ``LISTS``.
        layout, weight_layout: one of ``LAYOUTS``, of input and weight.
    """

    batch: int = 2
    in_channels: int = 12
    out_channels: int = 10
    size: tuple[int, int] = (9, 11)
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)
    dilation: tuple[int, int] = (1, 1)
    depthwise: bool = False
    in_list: str = "odd"
    out_list: str = "odd"
    layout: str = "contiguous"
    weight_layout: str = "contiguous"
    dtype: torch.dtype = torch.float32
    bias: bool = True
    seed: int = 0

    def but(self, **changes: Any) -> Case:
        """The same case with some fields changed."""
        return dataclasses.replace(self, **changes)


@dataclass
class Sample:
    """The tensors and options of a :class:`Case`, as the ops take them."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    in_index: Tensor | None
    out_index: Tensor | None
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int

    @property
    def args(self) -> tuple[Any, ...]:
        """Positional arguments of ``torch.ops.bap_kernels.gathered_conv2d`` and of the references."""
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    @property
    def kept(self) -> tuple[int, int]:
        """K_in and K_out."""
        k_in = self.input.shape[1] if self.in_index is None else len(self.in_index)
        return k_in, self.weight.shape[0] if self.out_index is None else len(self.out_index)

    @property
    def depth(self) -> int:
        """Number of terms in one output element."""
        return (1 if self.groups != 1 else self.kept[0]) * self.weight.shape[2] * self.weight.shape[3]

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        """(N, K_out, oH, oW)."""
        size = reference.output_size(
            self.input.shape[2:], self.weight.shape[2:], self.stride, self.padding, self.dilation
        )
        return self.input.shape[0], self.kept[1], *size

    def to(self, device: torch.device | str) -> Sample:
        """The sample on another device, with the strides and the memory around its tensors."""
        return dataclasses.replace(
            self,
            input=moved(self.input, device),
            weight=moved(self.weight, device),
            bias=None if self.bias is None else moved(self.bias, device),
            in_index=None if self.in_index is None else moved(self.in_index, device),
            out_index=None if self.out_index is None else moved(self.out_index, device),
        )


def moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on another device with its strides; ``Tensor.to`` would make sliced and expanded ones dense."""
    count = tensor.untyped_storage().nbytes() // tensor.element_size()
    storage = tensor.detach().as_strided((count,), (1,), 0).to(device)
    return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def index_list(kind: str, count: int, rng: random.Random) -> Tensor | None:
    """An int32 list of channels below ``count``; ``kind`` is one of ``LISTS``."""
    if kind == "null":
        return None
    kept = {"zero": 0, "one": 1, "all": count}.get(kind)
    if kept is None:
        kept = rng.randint(1, max(1, count))
        kept = kept if kept % 2 == 1 else kept - 1
    channels = rng.sample(range(count), min(kept, count))
    if kind != "shuffled":
        channels.sort()
    return torch.tensor(channels, dtype=torch.int32)


def lay_out(values: Tensor, layout: str) -> Tensor:
    """``values`` (4-D) in another layout, with NaN in the memory around them; "expanded" repeats the first item."""
    if layout == "contiguous":
        return values.contiguous()
    if layout == "channels_last":
        # A plain copy may keep ambiguous strides where C, or H and W, are 1.
        n, c, h, w = values.shape
        return values.permute(0, 2, 3, 1).contiguous().as_strided((n, c, h, w), (h * w * c, 1, w * c, c))
    if layout == "expanded":
        return values[:1].contiguous().expand(values.shape)
    if layout == "transposed":
        return values.transpose(2, 3).contiguous().transpose(2, 3)
    n, c, h, w = values.shape
    if layout == "sliced":
        view = values.new_full((n + 1, c + 3, h + 2, w + 5), torch.nan)[1:, 2:-1, 1:-1, 2:-3]
    elif layout == "sliced_last":
        view = values.new_full((n, h + 1, w + 2, c + 3), torch.nan)[:, 1:, 1:-1, 1:-2].permute(0, 3, 1, 2)
    elif layout == "stepped":
        view = values.new_full((n, 2 * c, 2 * h, 3 * w), torch.nan)[:, ::2, ::2, ::3]
    else:
        raise ValueError(f"lay_out(): expected `layout` to be one of {LAYOUTS}, got {layout!r}.")
    return view.copy_(values)


def make_tensors(case: Case) -> Sample:
    """Tensors of ``case``: standard normal numbers on CPU, the same ones for the same case."""
    rng, generator = random.Random(case.seed), torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(case.dtype)

    out_channels = case.in_channels if case.depthwise else case.out_channels
    weight = normal(out_channels, 1 if case.depthwise else case.in_channels, *case.kernel)
    in_index = index_list(case.in_list, case.in_channels, rng)
    out_index = index_list(case.out_list, out_channels, rng)
    return Sample(
        input=lay_out(normal(case.batch, case.in_channels, *case.size), case.layout),
        weight=lay_out(weight, case.weight_layout),
        bias=normal(out_channels) if case.bias else None,
        in_index=in_index,
        out_index=in_index if case.depthwise else out_index,
        stride=case.stride,
        padding=case.padding,
        dilation=case.dilation,
        groups=case.in_channels if case.depthwise else 1,
    )


def make_fused(
    sample: Sample, flags: Sequence[str], dtype: torch.dtype, layout: str = "contiguous", seed: int = 0
) -> dict:
    """Keyword arguments of ``_gathered_conv2d_fused`` for the named ``flags``; the others stay off.

    Args:
        flags: any of in_scale, in_shift, in_relu, out_scale, out_shift, residual, out_relu, out_max (with out_relu).
        dtype: of the scales and shifts; the residual has that of the input.
        layout: of the residual, one of ``LAYOUTS``.
    """
    generator = torch.Generator().manual_seed(seed)
    k_in, k_out = sample.kept
    sizes = {"in_scale": k_in, "in_shift": k_in, "out_scale": k_out, "out_shift": k_out}
    fused: dict[str, Any] = dict.fromkeys((*sizes, "residual")) | {"in_relu": False, "out_relu": False}
    for flag in flags:
        if flag in sizes:
            fused[flag] = torch.randn(sizes[flag], generator=generator, dtype=torch.float64).to(dtype)
        elif flag == "residual":
            values = torch.randn(sample.output_shape, generator=generator, dtype=torch.float64)
            fused[flag] = lay_out(values.to(sample.input.dtype), layout)
        elif flag == "out_max":
            fused |= {"out_relu": True, "out_max": 0.75}
        else:
            fused[flag] = True
    return fused


def random_case(rng: random.Random) -> Case:
    """A random case with a result of at least one pixel, small enough for the loops of the reference."""
    dtypes = (torch.float32, torch.float32, torch.float32, torch.bfloat16, torch.bfloat16, torch.float64, torch.float16)
    kernel = rng.choice(((1, 1), (1, 1), (3, 3), (3, 3), (3, 3), (3, 2), (1, 3), (2, 2), (5, 5), (7, 7)))
    dilation = rng.choice(((1, 1), (1, 1), (1, 1), (2, 2), (1, 2), (3, 1)))
    padding = tuple(rng.randint(0, kernel[d // 2] // 2 + 1) for d in range(4))
    if rng.random() < 0.5:
        padding = (kernel[0] // 2, kernel[0] // 2, kernel[1] // 2, kernel[1] // 2)
    least = [max(1, dilation[d] * (kernel[d] - 1) + 1 - padding[2 * d] - padding[2 * d + 1]) for d in (0, 1)]
    size = (rng.randint(least[0], least[0] + 16), rng.randint(least[1], least[1] + rng.choice((4, 16, 40))))
    depthwise = rng.random() < 0.2
    # The reference spends its time per pair of channels and tap.
    most = 96 if depthwise else {1: 80, 2: 48, 3: 40, 4: 32, 6: 28, 9: 28}.get(kernel[0] * kernel[1], 12)
    in_channels, out_channels = rng.randint(1, most), rng.randint(1, most)
    return Case(
        batch=rng.choice((1, 1, 2, 2, 3, 5, 0)),
        in_channels=in_channels,
        out_channels=out_channels,
        size=size,
        kernel=kernel,
        stride=rng.choice(((1, 1), (1, 1), (1, 1), (2, 2), (2, 1), (1, 3))),
        padding=padding,  # type: ignore[arg-type]
        dilation=dilation,
        depthwise=depthwise,
        in_list=rng.choice((*LISTS, "odd", "odd", "shuffled")),
        out_list=rng.choice((*LISTS, "odd", "null")),
        layout=rng.choice((*LAYOUTS, "contiguous", "channels_last")),
        weight_layout=rng.choice(("contiguous", "contiguous", "channels_last", "sliced", "transposed")),
        dtype=rng.choice(dtypes),
        bias=rng.random() < 0.5,
        seed=rng.randrange(2**31),
    )


def unlisted(index: Tensor | None, count: int) -> Tensor:
    """The channels below ``count`` that ``index`` leaves out, int64 and sorted."""
    listed = set(range(count) if index is None else index.tolist())
    return torch.tensor([c for c in range(count) if c not in listed], dtype=torch.int64)


def poison(sample: Sample, value: float = torch.nan) -> Sample:
    """The sample with ``value`` in every channel of input, weight and bias that its lists leave out.

    The tensors keep their strides; they must not overlap themselves ("expanded").
    """
    off_in = unlisted(sample.in_index, sample.input.shape[1])
    off_out = unlisted(sample.out_index, sample.weight.shape[0])
    sample.input[:, off_in] = value
    sample.weight[off_out] = value
    if sample.groups == 1:
        sample.weight[:, off_in] = value
    if sample.bias is not None:
        sample.bias[off_out] = value
    return sample
