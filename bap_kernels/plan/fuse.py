"""Which operations one convolution takes over.

After it: a batch norm, a sum with another value, a ReLU, each the only reader of what comes before. Before it: a batch
norm, or a batch norm and a ReLU, whose result only convolutions read (networks that normalise before they convolve);
each of these convolutions then does that work while it reads.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from bap_kernels.plan.graph import Graph, Op, Value
from bap_kernels.plan.layout import Layout

__all__ = ["Group", "fuse"]

# Each convolution would repeat the work before it.
_MOST_READERS = 2


@dataclass(eq=False)
class Group:
    """A convolution with what it takes over; the result is that of the last one."""

    conv: Op
    source: Value  # what it reads, before `in_norm`
    last: Op
    in_norm: Op | None = None
    in_relu: bool = False
    norm: Op | None = None
    residual: Value | None = None
    relu: bool = False
    taken: list[Op] = field(default_factory=list)


def _only_reader(value: Value) -> Op | None:
    return value.consumers[0] if len(value.consumers) == 1 else None


def _is_relu(op: Op | None) -> bool:
    return op is not None and op.kind == "map" and op.act == "relu"


def _after(group: Group, layout: Layout, taken: set[Op]) -> None:
    following = _only_reader(group.last.output)
    if following is not None and following.kind == "norm" and following.output.dtype is group.last.output.dtype:
        group.norm = group.last = following
        group.taken.append(following)
        following = _only_reader(following.output)
    if group.conv.kind != "conv":
        return
    if following is not None and following.kind == "binary" and following.act == "add" and following not in taken:
        first, second = following.inputs if len(following.inputs) == 2 else (following.inputs[0],) * 2
        wanted = layout.stored[following.output]
        # Under autocast the terms may have several dtypes.
        alike = first.dtype is second.dtype is following.output.dtype
        # Where this term is a constant, it is not computed: the sum needs a step of its own.
        if alike and first is not second and np.isnan(layout.constant[group.last.output][wanted]).all():
            group.residual = second if first is group.last.output else first
            group.last = following
            group.taken.append(following)
            following = _only_reader(following.output)
    if _is_relu(following):
        assert following is not None
        group.relu, group.last = True, following
        group.taken.append(following)


def _before(groups: dict[Op, Group], producer: dict[Value, Op], layout: Layout, taken: set[Op]) -> None:
    readers: dict[Value, list[Group]] = {}
    for group in groups.values():
        readers.setdefault(group.source, []).append(group)
    for value, found in readers.items():
        if len(found) != len(value.consumers) or len(found) > _MOST_READERS:
            continue
        if any(group.conv.kind != "conv" or group.conv.output.dtype is not value.dtype for group in found):
            continue
        relu = producer[value] if _is_relu(producer[value]) else None
        norm = producer[relu.inputs[0]] if relu is not None else producer[value]
        if norm.kind != "norm" or norm in taken or (relu is not None and (_only_reader(norm.output) is not relu)):
            continue
        if relu in taken or not np.isnan(layout.constant[value]).all():
            continue
        for group in found:
            group.source, group.in_norm, group.in_relu = norm.inputs[0], norm, relu is not None
            group.taken.extend(op for op in (norm, relu) if op is not None)


def fuse(graph: Graph, layout: Layout) -> dict[Op, Group | None]:
    """The group that an operation ends, or None where another operation's group has taken it over.

    Operations that are not in the result stand alone.
    """
    groups: dict[Op, Group] = {}
    taken: set[Op] = set()
    for op in graph.ops:
        if op.kind in ("conv", "depthwise", "grouped"):
            group = groups[op] = Group(op, op.inputs[0], op)
            _after(group, layout, taken)
            taken.update(group.taken)
    _before(groups, graph.producer(), layout, taken)
    result: dict[Op, Group | None] = {}
    for group in groups.values():
        result.update(dict.fromkeys([group.conv, *group.taken]))
    for group in groups.values():
        result[group.last] = group
    return result
