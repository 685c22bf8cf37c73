"""A network as a list of operations on channels.

A `Value` is a tensor between operations; those with four axes have channels, numbered as in the dense network. An `Op`
says how the channels of its result come from those of its inputs:

    conv       each output channel is one filter over the listed input channels
    depthwise  output channel j comes from one input channel
    norm       a batch norm in eval mode: channel j from channel j, scaled and shifted
    map        channel j from channel j: activations, pooling
    binary     channel j from channel j of two inputs: sums, products
    cat        the inputs' channels after one another
    pad        channels of one constant before and after the input's
    input, opaque, output   no rule: all channels of everything
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Channels", "Graph", "Kind", "Op", "Value", "folded_norm"]

Kind = Literal["input", "conv", "depthwise", "norm", "map", "binary", "cat", "pad", "opaque", "output"]
# Channel numbers, int64.
Channels = np.ndarray


@dataclass(eq=False)
class Value:
    """A tensor between operations, or anything else that one hands to another."""

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
        module: the layer, of conv, depthwise and norm.
        call: of map and binary, what computes the result from the inputs' tensors; of opaque, from ``args``.
        sources: of conv, the input channels that it reads; of depthwise, the input channel of each output channel.
        filters: of conv and depthwise, the filter of each output channel, -1 where the output is zero.
        args, kwargs: of opaque and output, what is handed over, with `Value` objects in the tensors' places.
        act: of map, the name of an activation that other steps can take over.
        elementwise: of map, whether each number depends on one number only.
        fill: of pad, the constant; ``before`` channels of it come first.
        mutates: of opaque, whether it writes to its first argument.
    """

    kind: Kind
    name: str
    inputs: list[Value]
    output: Value
    module: nn.Module | None = None
    call: Callable[..., Any] | None = None
    sources: Channels | None = None
    filters: Channels | None = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    act: str = ""
    elementwise: bool = False
    fill: float = 0.0
    before: int = 0
    mutates: bool = False

    @property
    def reads(self) -> Channels:
        """``sources`` of conv and depthwise."""
        assert self.sources is not None
        return self.sources

    @property
    def writes(self) -> Channels:
        """``filters`` of conv and depthwise."""
        assert self.filters is not None
        return self.filters


@dataclass(eq=False)
class Graph:
    """The operations in an order in which they can run."""

    ops: list[Op]
    expected: Any  # the masked dense network's result on the example; None if it was not run
    recording: Any = None  # what the graph was made from, for those of other domains
    not_lowered: dict[str, str] = field(default_factory=dict)  # {convolution: why it is run as it is}

    @property
    def values(self) -> Iterator[Value]:
        """Every value, once."""
        return (op.output for op in self.ops)

    @property
    def lowered(self) -> tuple[str, ...]:
        """Names of the convolutions that are run on the channels that are read."""
        names = dict.fromkeys(op.name for op in self.ops if isinstance(op.module, nn.Conv2d))
        return tuple(name for name in names if name not in self.not_lowered)

    def producer(self) -> dict[Value, Op]:
        """The operation that makes each value."""
        return {op.output: op for op in self.ops}


def folded_norm(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """A batch norm in eval mode as y = scale * x + shift; two (C,) float64 tensors."""
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    with torch.no_grad():
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight.double()
        shift = -norm.running_mean.double() * scale
        if norm.bias is not None:
            shift = shift + norm.bias.double()
    return scale, shift
