"""Classifiers behind a flattening or a mean over pixels: what keeps the channels of a last tensor in order.

To a plan such a step has no rule, as its result has no channels. Column j * P + p of the classifier reads pixel p of
channel j, with P pixels (one after a mean).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from bap_kernels.plan.graph import Channels, Graph, Op, Value
from bap_kernels.plan.operations import Call, has_hooks

__all__ = ["Head", "heads_of"]

_FLATTENINGS = (torch.flatten, torch.reshape, torch.squeeze, "flatten", "reshape", "view", "squeeze")
_MEANS = (torch.mean, "mean", torch.sum, "sum", torch.amax, "amax")
# They tell sizes, whatever the order of channels.
_SIZES = ("size", "dim")


@dataclass(frozen=True)
class Head:
    """A linear layer that reads all pixels of a value.

    Attributes:
        value: what is flattened.
        linear: the layer.
        steps: the steps without a rule that are known by this.
    """

    value: Value
    linear: nn.Linear
    steps: tuple[Op, ...]

    def columns(self, order: Channels) -> Channels:
        """The order of the layer's columns for an order of the channels."""
        pixels = self.linear.in_features // len(order)
        return (order[:, None] * pixels + np.arange(pixels)).ravel()


def _tells_size(op: Op) -> bool:
    target = op.call.target if isinstance(op.call, Call) else None
    return target in _SIZES or (target is getattr and op.args[1:2] in (("shape",), ("dtype",), ("device",)))


def _over_pixels(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    axes = kwargs.get("dim", args[1] if len(args) > 1 else None)
    return isinstance(axes, (list, tuple)) and sorted(axis % 4 for axis in axes if isinstance(axis, int)) == [2, 3]


def _flattened(op: Op) -> Value | None:
    """The value whose channels, or all of whose pixels, the result has one after another."""
    if op.kind != "opaque" or not isinstance(op.call, Call) or not op.args or not isinstance(op.args[0], Value):
        return None
    value, target = op.args[0], op.call.target
    if value.shape is None or len(value.shape) != 4 or op.output.shape is None:
        return None
    N, C, H, W = value.shape
    if isinstance(target, nn.Module):
        known = type(target) is nn.Flatten and not has_hooks(target)
    elif target in _MEANS:
        return value if op.output.shape == (N, C) and _over_pixels(op.args, op.kwargs) else None
    else:
        known = target in _FLATTENINGS
    # Such steps keep the order of numbers, so the shape says all.
    return value if known and op.output.shape == (N, C * H * W) else None


def _linear(op: Op) -> nn.Linear | None:
    target = op.call.target if op.kind == "opaque" and isinstance(op.call, Call) else None
    plain = type(target) is nn.Linear and not has_hooks(target) and "weight" in target._parameters
    if not plain or len(op.args) != 1 or op.kwargs or op.args[0] is not op.inputs[0]:
        return None
    return target  # type: ignore[return-value]


def heads_of(graph: Graph) -> list[Head]:
    """The classifiers whose columns can follow an order of channels, with the steps on the way to them."""
    held: dict[int, int] = {}
    for op in graph.ops:
        target = op.call.target if isinstance(op.call, Call) else None
        for parameter in target.parameters() if isinstance(target, nn.Module) else ():
            held[id(parameter)] = held.get(id(parameter), 0) + 1
        for one in op.call.args if isinstance(op.call, Call) else ():
            held[id(one)] = held.get(id(one), 0) + 1
    heads = []
    for op in graph.ops:
        value = _flattened(op)
        if value is None:
            continue
        linears = [_linear(reader) for reader in op.output.consumers]
        # A layer that is used twice would have to follow two orders.
        if not linears or any(one is None or held[id(one.weight)] > 1 for one in linears):
            continue
        sizes = tuple(reader for reader in value.consumers if _tells_size(reader))
        steps = (op, *op.output.consumers, *sizes)
        heads += [Head(value, one, steps) for one in linears if one is not None]
    return heads
