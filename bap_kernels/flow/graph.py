"""A network as a list of operations on channels.

A `Value` is a tensor between operations; those with four axes have channels, numbered as in the dense network. An `Op`
says how the channels of its result depend on those of its inputs:

    conv       each output channel is one filter over the listed input channels
    depthwise  output channel j comes from one input channel
    grouped    a group of output channels comes from a group of input channels
    take       output channel j is a channel of the input: slices, chunks, shuffles
    size       what tells the input's shape, dtype or device, for which its channels need not be there
    norm       a batch norm in eval mode: channel j from channel j, scaled and shifted
    map        channel j from channel j: activations, pooling; other inputs are read whole
    binary     channel j from channel j of two inputs: sums, products
    cat        the inputs' channels after one another
    pad        channels of one constant before and after the input's
    input, opaque, output   no rule: all channels of everything
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from bap_kernels._warn import warn
from bap_kernels.flow.ops import Call

__all__ = ["Channels", "Graph", "Op", "Value", "computed_groups", "dense_size", "first_reasons", "groups_of", "members"]

# Channel numbers, int64.
Channels = np.ndarray


@dataclass(eq=False)
class Value:
    """A tensor between operations, or any other result that another operation takes."""

    name: str
    shape: tuple[int, ...] | None  # on the example; None: no tensor
    dtype: torch.dtype | None = None
    consumers: list[Op] = field(default_factory=list)

    @property
    def channels(self) -> int | None:
        """How many channels it has; None for what is not (N, C, H, W)."""
        return self.shape[1] if self.shape is not None and len(self.shape) == 4 else None


@dataclass(eq=False)
class Op:
    """One operation.

    Attributes:
        name: the layer's name in the model, or the traced node's.
        module: the layer, of conv, depthwise, grouped and norm.
        call: of map and binary, what computes the result from the inputs' tensors; of opaque, from ``args``.
        reads: of conv, the input channels that it reads; of depthwise and take, the input channel of each output
            channel.
        writes: of conv and depthwise, the filter of each output channel, -1 where the output is zero.
        args, kwargs: of opaque and output, what is handed over, with `Value` objects in the tensors' places; of map and
            size, what follows the first argument.
        act: of map, the name of an activation that other steps can take over.
        elementwise: of map, whether each number depends on one number only.
        zeros: of map, whether a channel of zeros stays one.
        fixed: of conv, depthwise and grouped, whether its filters are computed from the layer's parameters; of map,
            whether the model's layer is made for a number of channels.
        padding: of conv, depthwise and grouped, instead of the layer's.
        pure: of opaque, whether it may be left out where nothing reads the result.
        fill: of pad, the constant; ``before`` channels of it come first.
        mutates: of opaque, whether it writes to its first argument.
    """

    kind: str
    name: str
    inputs: list[Value]
    output: Value
    module: nn.Module | None = None
    call: Callable[..., Any] | None = None
    reads: Channels = field(default_factory=lambda: np.arange(0))
    writes: Channels = field(default_factory=lambda: np.arange(0))
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    act: str = ""
    elementwise: bool = False
    fill: float = 0.0
    before: int = 0
    mutates: bool = False
    zeros: bool = True
    fixed: bool = False
    padding: tuple[int, int] | None = None
    pure: bool = False

    @property
    def aligned(self) -> list[Value]:
        """The inputs whose channel j the result's channel j is made of."""
        if self.kind == "binary":
            return self.inputs
        same = self.kind in ("norm", "map")
        same = same or (self.kind == "depthwise" and np.array_equal(self.reads, np.arange(len(self.reads))))
        return self.inputs[:1] if same else []

    @property
    def others(self) -> list[Value]:
        """Of map, the inputs that are read whole."""
        return self.inputs[1:] if self.kind == "map" else []

    @property
    def tells_channels(self) -> bool:
        """Of size, whether the model's code can see the number of channels."""
        asked = self.args[0] if self.args else None
        if isinstance(asked, int):
            return asked % 4 == 1
        if asked in ("dtype", "device") or _target(self) == "dim":
            return False
        return any(_sees_channels(consumer) for consumer in self.output.consumers)

    @property
    def conv(self) -> nn.Conv2d:
        """The layer of conv, depthwise and grouped."""
        assert isinstance(self.module, nn.Conv2d)
        return self.module


@dataclass(eq=False)
class Graph:
    """The operations in an order in which they can run."""

    ops: list[Op]
    expected: Any  # the masked dense network's result on the example; None if it was not run
    recording: Any = None  # what the graph was made from, for those of other domains
    not_lowered: dict[str, str] = field(default_factory=dict)  # {convolution: why it is run as it is}
    draws: bool = False  # whether the model draws random numbers; `expected` is then of a run with a seed

    @property
    def values(self) -> Iterator[Value]:
        """Every value, once."""
        return (op.output for op in self.ops)

    @property
    def lowered(self) -> tuple[str, ...]:
        """Names of the convolutions that are run on the channels that are read."""
        names = dict.fromkeys(op.name for op in self.ops if isinstance(op.module, nn.Conv2d))
        return tuple(name for name in names if name not in self.not_lowered)

    def warn_if_nothing(self, op: str) -> None:
        """Warns where there are convolutions and none was lowered.

        Args:
            op: the caller's name.
        """
        if self.not_lowered and not self.lowered:
            warn(
                f"{op}(): no convolution of the model was lowered: it is run as it is, on all channels. "
                f"{first_reasons(self.not_lowered)}"
            )

    def producer(self) -> dict[Value, Op]:
        """The operation that makes each value."""
        return {op.output: op for op in self.ops}


def _target(op: Op) -> Any:
    return op.call.target if isinstance(op.call, Call) else None


def _sees_channels(op: Op) -> bool:
    """Whether what reads a shape (N, C, H, W) can see C."""
    if getattr(_target(op), "__name__", "") != "getitem" or len(op.args) != 2:
        return True
    axes = op.args[1]
    if isinstance(axes, int):
        return axes % 4 == 1
    if not isinstance(axes, slice) or any(isinstance(end, Value) for end in (axes.start, axes.stop, axes.step)):
        return True
    return 1 in range(4)[axes]


def dense_size(op: Op) -> tuple[Call, tuple[Any, ...]]:
    """What a size operation calls on a tensor that stores only some channels, and the arguments that follow it."""
    channels = op.inputs[0].channels
    if op.args and isinstance(op.args[0], int):
        return Call(_size_of, channels=channels), op.args
    return Call(_shape_of, channels=channels), ()


def _shape_of(x: torch.Tensor, channels: int) -> tuple[int, ...]:
    return torch.Size((x.shape[0], channels, *x.shape[2:]))


def _size_of(x: torch.Tensor, axis: int, channels: int) -> int:
    return channels if axis % 4 == 1 else x.shape[axis]


def first_reasons(reasons: Mapping[str, str], most: int = 3) -> str:
    """The first of {layer: reason}, as text.

    Examples:
        >>> from bap_kernels.flow.graph import first_reasons
        >>> first_reasons({"a": "it has hooks", "b": "it has hooks"}, most=1)
        "'a': it has hooks; and 1 more."
    """
    text = "; ".join(f"{name!r}: {reason}" for name, reason in list(reasons.items())[:most])
    return f"{text}; and {len(reasons) - most} more." if len(reasons) > most else f"{text}."


def groups_of(op: Op, channels: Channels) -> Channels:
    """The groups of a grouped convolution that have any of these output channels."""
    return np.unique(channels // (op.conv.out_channels // op.conv.groups))


def members(groups: Channels, size: int) -> Channels:
    """All channels of some groups of this size."""
    return (groups[:, None] * size + np.arange(size)).ravel()


def computed_groups(op: Op, channels: Channels) -> tuple[Channels, Channels, int]:
    """(filters, input channels, groups) that give these output channels of a depthwise or grouped convolution.

    Grouped convolutions compute whole groups.
    """
    if op.kind == "depthwise":
        return op.writes[channels], op.reads[channels], len(channels)
    groups, conv = groups_of(op, channels), op.conv
    sizes = conv.out_channels // conv.groups, conv.in_channels // conv.groups
    return members(groups, sizes[0]), members(groups, sizes[1]), len(groups)
