"""Which channels of a network's values go together, for what lays channels out or changes a model in place.

Every channel of every value is an element. Elements that must go together (through batch norms, activations, sums,
concatenations, a layer used twice) are one class.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
from torch import Tensor, nn

from bap_kernels.flow.graph import Channels, Graph, Op, Value
from bap_kernels.flow.ops import Call

__all__ = ["Classes", "UnionFind", "keep_unknown", "tied_channels", "tied_values", "unknown"]


class UnionFind:
    """Disjoint sets of the numbers below ``count``."""

    def __init__(self, count: int) -> None:
        self._parent = list(range(count))

    def find(self, element: int) -> int:
        """The element that stands for the set."""
        parent = self._parent
        while parent[element] != element:
            parent[element] = parent[parent[element]]
            element = parent[element]
        return element

    def union(self, a: int, b: int) -> None:
        """Makes the sets of two elements one, for which that of ``b`` stands."""
        self._parent[self.find(a)] = self.find(b)

    def leaders(self) -> np.ndarray:
        """Of every element, the one that stands for its set, (count,) int64."""
        return np.array([self.find(element) for element in range(len(self._parent))], dtype=np.int64)


class Classes:
    """Classes of the channels of all values, and which of them are kept.

    Attributes:
        first: {value: number of its first element}, in the graph's order.
        kept: (elements,) bool, what :meth:`keep` marked.
    """

    def __init__(self, graph: Graph) -> None:
        self.first: dict[Value, int] = {}
        count = 0
        for value in graph.values:
            if value.channels is not None:
                self.first[value] = count
                count += value.channels
        self._sets = UnionFind(count)
        self.kept = np.zeros(count, dtype=bool)

    def leaders(self) -> np.ndarray:
        """Of every element, what stands for its class."""
        return self._sets.leaders()

    def tie(self, a: Value, b: Value, begin: int = 0) -> None:
        """Channel j of ``a`` goes with channel ``begin + j`` of ``b``."""
        for channel in range(a.channels or 0):
            self._sets.union(self.first[a] + channel, self.first[b] + begin + channel)

    def tie_groups(self, a: Value, b: Value, groups: int) -> None:
        """All channels of a group of ``a`` go with the first one of that group of ``b``."""
        size_a, size_b = ((value.channels or 0) // groups for value in (a, b))
        for channel in range(size_a * groups):
            self._sets.union(self.first[a] + channel, self.first[b] + channel // size_a * size_b)

    def keep(self, value: Value, channels: Channels | slice) -> None:
        """Marks channels of a value; values without channels are ignored."""
        if value in self.first:
            self.kept[self.first[value] + np.arange(value.channels or 0)[channels]] = True

    def leaders_of(self, value: Value, leaders: np.ndarray) -> np.ndarray:
        """What stands for the classes of a value's channels; ``leaders`` is the result of :meth:`leaders`."""
        first = self.first.get(value, 0)
        return leaders[first : first + (value.channels or 0)] if value in self.first else leaders[:0]

    def keep_whole_classes(self) -> None:
        """Marks all elements of each class of which one is marked."""
        leaders = self.leaders()
        kept = np.zeros(len(leaders), dtype=bool)
        kept[leaders[self.kept]] = True
        self.kept = kept[leaders]

    def kept_of(self, value: Value) -> Channels:
        """Numbers of the marked channels of a value."""
        first = self.first[value]
        return np.flatnonzero(self.kept[first : first + (value.channels or 0)])


def tied_channels(graph: Graph) -> Classes:
    """The classes of a network's channels, nothing marked."""
    classes = Classes(graph)
    used: dict[nn.Module, Op] = {}
    for op in graph.ops:
        for value in op.inputs if op.kind == "depthwise" else op.aligned:
            classes.tie(value, op.output)
        if op.kind == "grouped":
            # A group goes as a whole.
            for value in (op.inputs[0], op.output):
                classes.tie_groups(value, op.output, op.conv.groups)
        elif op.kind == "cat":
            begin = 0
            for value in op.inputs:
                classes.tie(value, op.output, begin)
                begin += value.channels or 0
        elif op.kind == "pad":
            classes.tie(op.inputs[0], op.output, op.before)
        if op.module is not None:
            first = used.setdefault(op.module, op)
            if first is not op:
                classes.tie(first.inputs[0], op.inputs[0])
                classes.tie(first.output, op.output)
    return classes


def tied_values(graph: Graph) -> list[list[Value]]:
    """Groups of values whose channel j is made of channel j of the others."""
    values = [value for value in graph.values if value.channels is not None]
    number = {value: place for place, value in enumerate(values)}
    sets = UnionFind(len(values))
    for op in graph.ops:
        for value in op.inputs if op.kind == "pad" and op.before == 0 else op.aligned:
            sets.union(number[value], number[op.output])
    groups: dict[int, list[Value]] = {}
    for value, leader in zip(values, sets.leaders().tolist(), strict=True):
        groups.setdefault(leader, []).append(value)
    return list(groups.values())


def _held_elsewhere(graph: Graph) -> set[int]:
    """Ids of the tensors that operations without a rule hold: those of a module, or one that the model's code names."""
    held: set[int] = set()
    for op in graph.ops:
        if op.kind == "opaque" and isinstance(op.call, Call):
            if isinstance(op.call.target, nn.Module):
                held.update(id(tensor) for tensor in (*op.call.target.parameters(), *op.call.target.buffers()))
            held.update(id(arg) for arg in op.call.args if isinstance(arg, Tensor))
    return held


def keep_unknown(classes: Classes, graph: Graph, free: Collection[Op] = (), widths: bool = False) -> None:
    """Marks the channels around operations without a rule, and those of inputs and results.

    Args:
        classes: gets the marks.
        graph: the network.
        free: operations without a rule around which nothing is marked.
        widths: also mark values whose number of channels the model's code asks for.
    """
    for op, values, _ in unknown(graph, widths):
        for value in () if op in free else values:
            classes.keep(value, slice(None))


def unknown(graph: Graph, widths: bool = False) -> Iterator[tuple[Op, list[Value], str]]:
    """The operations around which channels must stay: (operation, the values whose channels these are, why)."""
    held = _held_elsewhere(graph)
    for op in graph.ops:
        # An operation without a rule may have the same layer.
        tensors = () if op.module is None else (*op.module._parameters.values(), *op.module._buffers.values())
        around = [*op.inputs, op.output]
        if op.kind in ("input", "output"):
            yield op, around, f"it is the model's {op.kind}"
        elif op.kind == "opaque":
            yield op, around, f"{op.call!r} has no rule"
        elif op.kind == "take":
            yield op, around, "the model's code takes channels by their numbers"
        elif op.fixed:
            yield op, around, "its filters are computed, or made for a number of channels"
        elif any(id(tensor) in held for tensor in tensors):
            yield op, around, "a step without a rule has its parameters, too"
        elif widths and op.kind == "size" and op.tells_channels:
            yield op, around, "the model's code asks for the number of channels"
        elif op.others:
            yield op, op.others, "it is the same for all channels"
