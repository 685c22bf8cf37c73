"""Which channels each value stores, and in which order.

A value stores its live channels only. Values whose channels are tied (through batch norms, activations, sums) get one
common order, in which channels that more of them store come first. In a residual network the channels that later layers
read are among those that earlier ones read, so what the next sum reads of the stream is its first part, a view; a
convolution that is the only consumer gets exactly its list, in its order.

Concatenations that each begin with all parts of the one before (DenseNet) are a chain: they share one buffer, which
holds what any of them reads, and each is the first part of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from bap_kernels.flow.classes import tied_values
from bap_kernels.flow.graph import Channels, Graph, Op, Value
from bap_kernels.flow.liveness import Liveness

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
        return sum(len(stored) for stored in self.stored[:parts])


@dataclass
class Fetch:
    """How to get channels from a stored value.

    Attributes:
        positions: which of the stored channels.
        fill: constants that follow them.
        order: the permutation of the two that gives the result; None: as they are.
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
        for members in tied_values(graph):
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
            chain = next((known for known in chains if known.parts == op.inputs[: len(known.parts)]), None)
            if chain is None:
                chain = Chain([])
                chains.append(chain)
            chain.parts = list(op.inputs)
            chain.members.append(op)
            self.chains[op] = chain
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
                first, shifted = 0, []
                for part, stored in zip(op.inputs, chain.stored, strict=False):
                    shifted.append(stored + first)
                    first += part.channels or 0
                self.stored[op.output] = np.concatenate(shifted) if shifted else np.arange(0)

    def positions(self, value: Value) -> Channels:
        """Of every channel its position among the stored ones; -1 where it is not stored."""
        stored = self.stored[value]
        positions = np.full(value.channels or 0, -1)
        positions[stored] = np.arange(len(stored))
        return positions

    def fetch(self, value: Value, channels: Channels) -> Fetch | None:
        """How to get these channels, in this order; None where the value stores just that."""
        if np.array_equal(self.stored[value], channels):
            return None
        positions = self.positions(value)[channels]
        missing = positions < 0
        fill = self.constant[value][channels[missing]]
        assert not np.isnan(fill).any(), f"{value.name}: a channel that is read is neither stored nor constant"
        order = None
        if missing.any() and not missing[np.argmax(missing) :].all():
            order = np.argsort(np.argsort(missing, kind="stable"), kind="stable")
        return Fetch(positions[~missing], fill, order)
