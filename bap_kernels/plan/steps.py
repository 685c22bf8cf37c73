"""The steps of a planned network: each reads slots of a list of tensors and writes one.

A step is called with that list; everything else it holds since the plan was made. Convolutions are in
:mod:`bap_kernels.plan.conv_steps`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bap_kernels._load import _C
from bap_kernels.flow.arguments import leaves_of, map_leaves
from bap_kernels.plan.pooling import Pooling

__all__ = [
    "BinaryStep",
    "BufferStep",
    "CatStep",
    "FetchStep",
    "InputStep",
    "MapStep",
    "NormStep",
    "OpaqueStep",
    "Slot",
    "Step",
    "ViewStep",
    "fill_slots",
    "selected",
    "slots_in",
]

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

    def join(self, run: _C.StepRun, freed: tuple[int, ...]) -> bool:
        """Adds itself to a run of native steps.

        Args:
            run: the run.
            freed: the slots that nothing reads after it.

        Returns:
            False: there is no such native step, and nothing was added.
        """
        return False

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

    def join(self, run: _C.StepRun, freed: tuple[int, ...]) -> bool:  # noqa: D102
        run.add_contiguous(self.out, self.out, freed, self.memory_format)
        return True


class NormStep(Step):
    """A batch norm by itself, on compact vectors."""

    def __init__(self, vectors: tuple[Tensor | None, ...], eps: float, x: int, out: int) -> None:
        self.vectors, self.eps = vectors, eps
        self.reads, self.out = (x,), out

    def __call__(self, env: Env) -> None:  # noqa: D102
        weight, bias, mean, var = self.vectors
        env[self.out] = torch.batch_norm(env[self.reads[0]], weight, bias, mean, var, False, 0.0, self.eps, False)

    def join(self, run: _C.StepRun, freed: tuple[int, ...]) -> bool:  # noqa: D102
        run.add_norm(self.reads[0], self.out, freed, self.vectors, self.eps)
        return True


class MapStep(Step):
    """An activation or a pooling."""

    # Some, such as slices, return a view.
    fresh = False
    in_place = False

    def __init__(self, call: Callable[..., Any], act: str, x: int, out: int) -> None:
        self.call, self.act = call, act
        self.reads, self.out = (x,), out

    def reuse_input(self) -> None:
        """Writes the result over the input, where the activation can."""
        if self.act:
            self.call, self.in_place = {"relu": torch.relu_, "relu6": _relu6_}[self.act], True

    def __call__(self, env: Env) -> None:  # noqa: D102
        env[self.out] = self.call(env[self.reads[0]])

    def join(self, run: _C.StepRun, freed: tuple[int, ...]) -> bool:  # noqa: D102
        if self.in_place:
            run.add_relu(self.reads[0], self.out, freed, 6.0 if self.act == "relu6" else None)
            return True
        return isinstance(self.call, Pooling) and self.call.join(run, self.reads[0], self.out, freed)


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

    def join(self, run: _C.StepRun, freed: tuple[int, ...]) -> bool:  # noqa: D102
        run.add_cat(self.reads, self.out, freed)
        return True


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

    def join(self, run: _C.StepRun, freed: tuple[int, ...]) -> bool:  # noqa: D102
        made = (self.width, self.first, self.zeros_from, self.memory_format, self.dtype)
        run.add_buffer(self.parts, self.out, freed, *made)
        return True


class ViewStep(Step):
    """Channels of a tensor that follow one another."""

    fresh = False

    def __init__(self, x: int, count: int, out: int, begin: int = 0, dtype: torch.dtype | None = None) -> None:
        self.begin, self.count, self.dtype = begin, count, dtype
        self.reads, self.out = (x,), out

    def __call__(self, env: Env) -> None:  # noqa: D102
        x = env[self.reads[0]].narrow(1, self.begin, self.count)
        env[self.out] = x if self.dtype is None else x.to(self.dtype)

    def join(self, run: _C.StepRun, freed: tuple[int, ...]) -> bool:  # noqa: D102
        run.add_view(self.reads[0], self.out, freed, self.begin, self.count, self.dtype)
        return True


def _filled(x: Tensor, fill: Tensor | int) -> Tensor:
    """The tensor with constant channels after its own: that many zeros, or those of a vector."""
    if isinstance(fill, int):
        return F.pad(x, (0, 0, 0, 0, 0, fill))
    return torch.cat([x, fill.to(x.dtype).view(1, -1, 1, 1).expand(x.shape[0], -1, *x.shape[2:])], 1)


def selected(x: Tensor, index: Tensor) -> Tensor:
    """The listed channels, in the memory format of the tensor."""
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
            x = selected(x, self.index)
        if self.fill is not None:
            x = _filled(x, self.fill)
        if self.order is not None:
            x = selected(x, self.order)
        env[self.out] = x

    def join(self, run: _C.StepRun, freed: tuple[int, ...]) -> bool:  # noqa: D102
        run.add_fetch(self.reads[0], self.out, freed, self.index, self.fill, self.order)
        return True

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


def _relu6_(x: Tensor) -> Tensor:
    return F.hardtanh_(x, 0.0, 6.0)
