"""The steps of a planned network: each reads slots of a list of tensors and writes one.

A step is called with that list; everything else it holds since the plan was made. Weights are read from the model's own
parameters at every call; only filters of depthwise and grouped convolutions, folded with their batch norm, are copies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bap_kernels._load import _C
from bap_kernels.flow.arguments import leaves_of, map_leaves
from bap_kernels.functional import plain_conv2d

__all__ = [
    "BinaryStep",
    "BufferStep",
    "CatStep",
    "ConvStep",
    "DepthwiseStep",
    "FetchStep",
    "GroupedStep",
    "InputStep",
    "MapStep",
    "NormStep",
    "OpaqueStep",
    "Slot",
    "Step",
    "ViewStep",
    "fill_slots",
    "slots_in",
]

_fused = torch.ops.bap_kernels._gathered_conv2d_fused.default
_CPU_BACKENDS = ("auto", "heuristic", "native", "aten")
Env = list[Any]


@dataclass(frozen=True)
class Slot:
    """Stands for a tensor in arguments: its place in the list of tensors."""

    number: int


class Step:
    """One step.

    Attributes:
        name: the layer, or the node of the recording, that it comes from.
        reads: slots.
        out: the slot that it writes.
        fresh: whether the result is memory of its own, so that the next step may write into it.
        kept: "stored/all" channels of the result, for the table.
        note: what else the table says.
    """

    name: str = ""
    reads: tuple[int, ...] = ()
    out: int = -1
    fresh: bool = True
    kept: str = ""
    note: str = ""

    def __call__(self, env: Env) -> None:
        """Runs it."""
        raise NotImplementedError

    @property
    def writes(self) -> tuple[int, ...]:
        """All slots that it writes."""
        return (self.out,)

    @property
    def kind(self) -> str:
        """Its name in the table."""
        return type(self).__name__.removesuffix("Step").lower()


class InputStep(Step):
    """Brings an input into the plan's memory format."""

    fresh = False

    def __init__(self, slot: int, memory_format: torch.memory_format) -> None:
        self.reads, self.out = (slot,), slot
        self.memory_format = memory_format

    def __call__(self, env: Env) -> None:  # noqa: D102
        env[self.out] = env[self.out].contiguous(memory_format=self.memory_format)


class ConvStep(Step):
    """A convolution with lists and all that was fused into it.

    Attributes:
        out_max: the largest result that the ReLU leaves; None: there is none.
        cast: the dtype in which it computes under autocast; None: the weight's.
        dual_store: the slot of a second, compact store of the result's channels ``dual_index``; None: there is none.
    """

    out_max: float | None = None
    dual_store: int | None = None
    dual_index: Tensor | None = None

    def __init__(
        self,
        conv: nn.Conv2d,
        padding: tuple[int, int, int, int],
        lists: tuple[Tensor | None, Tensor | None, Tensor | None],
        before: tuple[Tensor | None, Tensor | None, bool],
        after: tuple[Tensor | None, Tensor | None],
        relu: bool,
        reads: tuple[int, ...],
        out: int,
        cast: torch.dtype | None = None,
    ) -> None:
        self.cast = cast
        self.parameters: dict[str, Any] = conv._parameters
        self.stride, self.padding, self.dilation = tuple(conv.stride), padding, tuple(conv.dilation)
        self.in_index, self.out_index, self.weight_index = lists
        self.before, self.after = before, after
        self.relu = relu
        self.reads, self.out = reads, out
        self.residual = reads[1] if len(reads) > 1 else None
        self._options: tuple[Any, ...] = (self.stride, self.padding, self.dilation, 1)

    def __call__(self, env: Env) -> None:  # noqa: D102
        parameters = self.parameters
        weight, bias = parameters["weight"], parameters["bias"]
        residual = None if self.residual is None else env[self.residual]
        x = env[self.reads[0]]
        if self.cast is not None:
            x, weight, bias = x.to(self.cast), weight.to(self.cast), None if bias is None else bias.to(self.cast)
        lists = (self.in_index, self.out_index)
        fusion: Any = (*self.before, *self.after, residual, self.relu, True, self.weight_index, self.dual_index)
        fusion += (self.out_max,)
        if torch.compiler.is_compiling():
            result = _fused(x, weight, bias, *lists, *self._options, *fusion)
        else:
            result = _C.gathered_conv2d_fused(x, weight, bias, *lists, *self._options, *fusion)
        env[self.out], second = result
        if self.dual_store is not None:
            env[self.dual_store] = second

    @property
    def writes(self) -> tuple[int, ...]:  # noqa: D102
        return (self.out,) if self.dual_store is None else (self.out, self.dual_store)

    @property
    def kind(self) -> str:
        """Its name in the table, with what it does."""
        parts = ["norm+" if self.before[0] is not None else "", "relu+" if self.before[2] else "", "conv"]
        parts += ["+norm" if self.after[1] is not None else "", "+add" if self.residual is not None else ""]
        return "".join(parts) + _name_of_relu(self.relu, self.out_max)


class DepthwiseStep(Step):
    """A depthwise convolution of compact tensors; its filters are copies with the batch norm folded in.

    On a GPU, and where one of its backends is named, it is PyTorch's: these backends have no depthwise kernels.

    Args:
        options: stride, padding, dilation and groups.
        sides: the padding of four sides.
        weight, bias: the filters.
        relu, out_max: what follows, as in :class:`ConvStep`.
        x, out: slots.
        cast: as in :class:`ConvStep`.
    """

    def __init__(
        self,
        options: tuple[Any, ...],
        sides: tuple[int, int, int, int],
        weight: Tensor,
        bias: Tensor | None,
        relu: bool,
        out_max: float | None,
        x: int,
        out: int,
        cast: torch.dtype | None = None,
    ) -> None:
        self.weight, self.bias = weight, bias
        self.options = options
        self.relu, self.out_max = relu, out_max
        self.reads, self.out = (x,), out
        self.cast = cast
        stride, _, dilation, groups = options
        self._options: tuple[Any, ...] = (stride, sides, dilation, groups)

    def __call__(self, env: Env) -> None:  # noqa: D102
        x, weight, bias = env[self.reads[0]], self.weight, self.bias
        compiling = torch.compiler.is_compiling()
        if x.device.type != "cpu" or not (compiling or _C.get_backend() in _CPU_BACKENDS):
            y = plain_conv2d(x, weight, bias, *self.options)
            if self.relu:
                y = torch.relu_(y) if self.out_max is None else F.hardtanh_(y, 0.0, self.out_max)
            env[self.out] = y
            return
        if self.cast is not None:
            x, weight, bias = x.to(self.cast), weight.to(self.cast), None if bias is None else bias.to(self.cast)
        fusion: Any = (None, None, False, None, None, None, self.relu, True, None, None, self.out_max)
        if compiling:
            result = _fused(x, weight, bias, None, None, *self._options, *fusion)
        else:
            result = _C.gathered_conv2d_fused(x, weight, bias, None, None, *self._options, *fusion)
        env[self.out] = result[0]

    @property
    def kind(self) -> str:
        """Its name in the table, with what it does."""
        return "depthwise" + _name_of_relu(self.relu, self.out_max)


class GroupedStep(Step):
    """A grouped convolution of whole groups, of whose result ``index`` is kept; None keeps all.

    Args:
        options: stride, padding, dilation and groups.
        weight, bias: the filters, copies with the batch norm folded in.
        x, out: slots.
    """

    index: Tensor | None = None

    def __init__(self, options: tuple[Any, ...], weight: Tensor, bias: Tensor | None, x: int, out: int) -> None:
        self.weight, self.bias = weight, bias
        self.options = options
        self.reads, self.out = (x,), out

    def __call__(self, env: Env) -> None:  # noqa: D102
        y = plain_conv2d(env[self.reads[0]], self.weight, self.bias, *self.options)
        env[self.out] = y if self.index is None else _selected(y, self.index)


class NormStep(Step):
    """A batch norm by itself, on compact vectors."""

    def __init__(self, vectors: tuple[Tensor | None, ...], eps: float, x: int, out: int) -> None:
        self.vectors, self.eps = vectors, eps
        self.reads, self.out = (x,), out

    def __call__(self, env: Env) -> None:  # noqa: D102
        weight, bias, mean, var = self.vectors
        env[self.out] = torch.batch_norm(env[self.reads[0]], weight, bias, mean, var, False, 0.0, self.eps, False)


class MapStep(Step):
    """An activation or a pooling."""

    # Some, such as slices, return a view.
    fresh = False

    def __init__(self, call: Callable[..., Any], act: str, x: int, out: int) -> None:
        self.call, self.act = call, act
        self.reads, self.out = (x,), out

    def reuse_input(self) -> None:
        """Writes the result over the input, where the activation can."""
        if self.act:
            self.call = {"relu": torch.relu_, "relu6": _relu6_}[self.act]

    def __call__(self, env: Env) -> None:  # noqa: D102
        env[self.out] = self.call(env[self.reads[0]])


class BinaryStep(Step):
    """A sum or a product of two tensors."""

    def __init__(self, call: Callable[..., Any], reads: tuple[int, ...], out: int) -> None:
        self.call = call
        self.reads, self.out = reads, out

    def __call__(self, env: Env) -> None:  # noqa: D102
        env[self.out] = self.call(env[self.reads[0]], env[self.reads[-1]])


class CatStep(Step):
    """A concatenation by itself."""

    def __init__(self, reads: tuple[int, ...], out: int) -> None:
        self.reads, self.out = reads, out

    def __call__(self, env: Env) -> None:  # noqa: D102
        env[self.out] = torch.cat([env[slot] for slot in self.reads], 1)


class BufferStep(Step):
    """Writes parts of a chain of concatenations into its buffer; the first such step makes the buffer.

    Attributes:
        zeros_from: the first channel that is zero until it is written to; None: there is none.
    """

    fresh = False
    zeros_from: int | None = None

    def __init__(
        self,
        parts: list[tuple[int, int, int]],
        width: int,
        first: bool,
        memory_format: torch.memory_format,
        out: int,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.parts, self.width, self.first = parts, width, first
        self.dtype = dtype
        self.memory_format = memory_format
        self.reads, self.out = tuple(slot for slot, _, _ in parts) + (() if first else (out,)), out

    def __call__(self, env: Env) -> None:  # noqa: D102
        if self.first:
            part = env[self.parts[0][0]]
            N, _, H, W = part.shape
            env[self.out] = torch.empty(
                (N, self.width, H, W),
                dtype=self.dtype or part.dtype,
                device=part.device,
                memory_format=self.memory_format,
            )
            if self.zeros_from is not None:
                env[self.out][:, self.zeros_from :] = 0
        buffer = env[self.out]
        for slot, begin, count in self.parts:
            buffer.narrow(1, begin, count).copy_(env[slot])


class ViewStep(Step):
    """Channels of a tensor that follow one another."""

    fresh = False

    def __init__(self, x: int, count: int, out: int, begin: int = 0, dtype: torch.dtype | None = None) -> None:
        self.begin, self.count, self.dtype = begin, count, dtype
        self.reads, self.out = (x,), out

    def __call__(self, env: Env) -> None:  # noqa: D102
        x = env[self.reads[0]].narrow(1, self.begin, self.count)
        env[self.out] = x if self.dtype is None else x.to(self.dtype)


def _filled(x: Tensor, fill: Tensor | int) -> Tensor:
    """The tensor with constant channels after its own: that many zeros, or those of a vector."""
    if isinstance(fill, int):
        return F.pad(x, (0, 0, 0, 0, 0, fill))
    return torch.cat([x, fill.to(x.dtype).view(1, -1, 1, 1).expand(x.shape[0], -1, *x.shape[2:])], 1)


def _selected(x: Tensor, index: Tensor) -> Tensor:
    # index_select of a channels_last tensor would lose its memory format.
    if x.is_contiguous() or x.stride(1) != 1:
        return x.index_select(1, index)
    return x.permute(0, 2, 3, 1).index_select(3, index).permute(0, 3, 1, 2)


class FetchStep(Step):
    """Channels of a stored tensor in another selection or order, with constants where they are not stored."""

    def __init__(self, index: Tensor | None, fill: Tensor | int | None, order: Tensor | None, x: int, out: int) -> None:
        self.index, self.fill, self.order = index, fill, order
        self.reads, self.out = (x,), out

    def __call__(self, env: Env) -> None:  # noqa: D102
        x = env[self.reads[0]]
        if self.index is not None:
            x = _selected(x, self.index)
        if self.fill is not None:
            x = _filled(x, self.fill)
        if self.order is not None:
            x = _selected(x, self.order)
        env[self.out] = x

    @property
    def kind(self) -> str:
        """Its name in the table, with what it does."""
        return "gather" if self.fill is None else "fill"


class OpaqueStep(Step):
    """Anything else, called as the model calls it."""

    fresh = False

    def __init__(self, call: Callable[..., Any], args: Any, kwargs: Any, reads: tuple[int, ...], out: int) -> None:
        self.call, self.args, self.kwargs = call, args, kwargs
        self.reads, self.out = reads, out
        # Which arguments hold slots, somewhere inside: nearly always one that is a slot itself.
        self.with_slots = [number for number, part in enumerate(args) if slots_in(part)]
        self.kwargs_with_slots = bool(slots_in(kwargs))

    def __call__(self, env: Env) -> None:  # noqa: D102
        args = list(self.args)
        for number in self.with_slots:
            args[number] = fill_slots(args[number], env)
        kwargs = fill_slots(self.kwargs, env) if self.kwargs_with_slots else self.kwargs
        env[self.out] = self.call(*args, **kwargs)


def fill_slots(part: Any, env: Env) -> Any:
    """Arguments in which slots are replaced by their tensors."""
    if isinstance(part, Slot):
        return env[part.number]
    return map_leaves(part, lambda leaf: env[leaf.number] if isinstance(leaf, Slot) else leaf)


def slots_in(part: Any) -> list[int]:
    """The numbers of the slots in arguments."""
    return [leaf.number for leaf in leaves_of(part) if isinstance(leaf, Slot)]


def _name_of_relu(relu: bool, out_max: float | None) -> str:
    return ("+relu" if out_max is None else f"+relu{out_max:g}") if relu else ""


def _relu6_(x: Tensor) -> Tensor:
    return F.hardtanh_(x, 0.0, 6.0)
