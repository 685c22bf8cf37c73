"""Which channels each value stores, and in which order.

A value stores its live channels only. Values whose channels are tied (through batch norms, activations, sums) get one
common order, in which channels that more of them store come first. In a residual network the channels that later layers
need are a part of those that earlier ones need, so what the next sum reads of the stream is the first part of it, and
a view; a convolution that is the only reader gets exactly its list, in its order.

Concatenations that each begin with all parts of the one before (DenseNet) are a chain: they share one buffer, which
holds what any of them needs, and each is the first part of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from bap_kernels.plan.graph import Channels, Graph, Op, Value
from bap_kernels.plan.liveness import Liveness

__all__ = ["Chain", "Fetch", "Layout"]


@dataclass(eq=False)
class Chain:
    """Concatenations in one buffer.

    Attributes:
        parts: the values in it, in order.
        stored: the channels of each part that the buffer holds.
        members: the concatenations, shortest first.
    """

    parts: list[Value]
    stored: list[Channels] = field(default_factory=list)
    members: list[Op] = field(default_factory=list)

    def width(self, parts: int) -> int:
        """Channels of the first parts of the buffer."""
        return sum(len(one) for one in self.stored[:parts])


@dataclass
class Fetch:
    """How to get channels from a stored value.

    Attributes:
        positions: which of the stored channels.
        fill: constants that follow them.
        order: the places of the two in the result; None: as they are.
    """

    positions: Channels
    fill: np.ndarray
    order: Channels | None

    @property
    def begin(self) -> int | None:
        """The first position where they follow one another; else None."""
        first = int(self.positions[0]) if len(self.positions) else 0
        return first if np.array_equal(self.positions, first + np.arange(len(self.positions))) else None


class Layout:
    """Stored channels of all values of a graph, ``stored[value]`` in order."""

    def __init__(self, graph: Graph, liveness: Liveness) -> None:
        self.constant = liveness.constant
        self.live = liveness.live
        self.stored: dict[Value, Channels] = {}
        self.chains: dict[Op, Chain] = {}
        producer = graph.producer()
        for members in _tied(graph).values():
            width = max(value.channels or 0 for value in members)
            count = np.zeros(width, dtype=np.int64)
            for value in members:
                count[: value.channels] += self.live[value]
            order = np.argsort(-count, kind="stable")
            for value in members:
                if producer[value].kind in ("input", "opaque"):
                    self.stored[value] = np.arange(value.channels or 0)
                else:
                    inside = order[order < (value.channels or 0)]
                    self.stored[value] = inside[self.live[value][inside]]
        self._chain(graph)

    def _chain(self, graph: Graph) -> None:
        chains: list[Chain] = []
        for op in graph.ops:
            if op.kind != "cat":
                continue
            longer = next((one for one in chains if one.parts == op.inputs[: len(one.parts)]), None)
            if longer is None:
                longer = Chain([])
                chains.append(longer)
            longer.parts = list(op.inputs)
            longer.members.append(op)
            self.chains[op] = longer
        for chain in chains:
            needed = [np.zeros(part.channels or 0, dtype=bool) for part in chain.parts]
            for op in chain.members:
                first = 0
                for need in needed[: len(op.inputs)]:
                    need |= self.live[op.output][first : first + len(need)]
                    first += len(need)
            # The part's own order where it stores exactly this.
            for part, need in zip(chain.parts, needed, strict=True):
                stored = self.stored[part]
                chain.stored.append(stored[need[stored]])
            for op in chain.members:
                first, placed = 0, []
                for part, stored in zip(op.inputs, chain.stored, strict=False):
                    placed.append(stored + first)
                    first += part.channels or 0
                self.stored[op.output] = np.concatenate(placed) if placed else np.arange(0)

    def fetch(self, value: Value, wanted: Channels) -> Fetch | None:
        """How to get these channels, in this order; None where the value is just that."""
        stored = self.stored[value]
        if np.array_equal(stored, wanted):
            return None
        place = np.full(value.channels or 0, -1)
        place[stored] = np.arange(len(stored))
        positions = place[wanted]
        missing = positions < 0
        fill = self.constant[value][wanted[missing]]
        assert not np.isnan(fill).any(), f"{value.name}: a channel that is read is neither stored nor constant"
        order = None
        if missing.any() and not missing[np.argmax(missing) :].all():
            order = np.argsort(np.argsort(missing, kind="stable"), kind="stable")
        return Fetch(positions[~missing], fill, order)


def _tied(graph: Graph) -> dict[Value, list[Value]]:
    """Groups of values whose channel j is made of channel j of the others."""
    leader: dict[Value, Value] = {value: value for value in graph.values if value.channels is not None}

    def find(value: Value) -> Value:
        while leader[value] is not value:
            leader[value] = leader[leader[value]]
            value = leader[value]
        return value

    for op in graph.ops:
        for value in op.inputs if op.kind == "pad" and op.before == 0 else op.aligned:
            leader[find(value)] = find(op.output)
    groups: dict[Value, list[Value]] = {}
    for value in leader:
        groups.setdefault(find(value), []).append(value)
    return groups
