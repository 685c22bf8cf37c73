"""Classifiers behind a flattening or a mean over pixels, whose columns follow the channels of the tensor before it.

A plan has no rule for such a step, as its result has no channels. Column j * P + p of the classifier reads pixel p of
channel j, with P pixels (one after a mean).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from bap_kernels.flow.graph import Channels, Graph, Op, Value
from bap_kernels.flow.ops import Call, asks_size, has_hooks, rule_of

__all__ = ["Head", "heads_of"]


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


def _asks_size(op: Op) -> bool:
    return op.kind == "size" or (isinstance(op.call, Call) and asks_size(op.call.target, op.args[1:]))


def _over_pixels(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    axes = kwargs.get("dim", args[1] if len(args) > 1 else None)
    return isinstance(axes, (list, tuple)) and sorted(axis % 4 for axis in axes if isinstance(axis, int)) == [2, 3]


def _flattened(op: Op) -> Value | None:
    """The value whose channels, or all of whose pixels, the result has one after another."""
    if op.kind != "opaque" or not isinstance(op.call, Call) or not op.args or not isinstance(op.args[0], Value):
        return None
    value, target = op.args[0], op.call.target
    rule = None if isinstance(target, nn.Module) and has_hooks(target) else rule_of(target)
    if rule is None or value.shape is None or len(value.shape) != 4 or op.output.shape is None:
        return None
    N, C, H, W = value.shape
    if rule.kind == "reduction":
        return value if op.output.shape == (N, C) and _over_pixels(op.args, op.kwargs) else None
    # Such steps keep the order of numbers where the result has two axes, so the shape says all.
    return value if rule.kind in ("move", "squeeze") and op.output.shape == (N, C * H * W) else None


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
        for arg in op.call.args if isinstance(op.call, Call) else ():
            held[id(arg)] = held.get(id(arg), 0) + 1
    heads = []
    for op in graph.ops:
        value = _flattened(op)
        if value is None:
            continue
        linears = [_linear(consumer) for consumer in op.output.consumers]
        # A layer that is used twice would have to follow two orders.
        if not linears or any(linear is None or held[id(linear.weight)] > 1 for linear in linears):
            continue
        sizes = tuple(consumer for consumer in value.consumers if _asks_size(consumer))
        steps = (op, *op.output.consumers, *sizes)
        heads += [Head(value, linear, steps) for linear in linears if linear is not None]
    return heads
