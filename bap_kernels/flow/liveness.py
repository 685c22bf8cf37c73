"""Which channels of each value any consumer reads, and which of them are constants.

Constants go forward: a filter that a mask leaves out is zero everywhere, batch norm makes another constant of it, and
so on; such channels are never computed. Reads go backward: a convolution reads its in-list, a sum reads of both terms
what is read of it, a concatenation reads of each part what is read of that part in it, an operation without a rule and
the result read everything.
"""

from __future__ import annotations

import numpy as np
import torch

from bap_kernels.flow.graph import Channels, Graph, Op, Value, groups_of, members
from bap_kernels.flow.norms import folded_norm

__all__ = ["Liveness"]

_FIRST = np.zeros(1, dtype=np.int64)


class Liveness:
    """What is known of every value with channels.

    Args:
        graph: the network.
        constants: whether constant channels are found; if not, none is taken for one.
        extents: whether one channel stays live where only the batch and image size of a tensor are needed: of the input
            of a convolution with an empty list, and where a shape is asked for.

    Attributes:
        constant: (C,) float64: what every pixel of the channel is; NaN where it is not one number.
        live: (C,) bool: channels that a consumer reads and that are not constant.
    """

    def __init__(self, graph: Graph, constants: bool = True, extents: bool = True) -> None:
        self.constant: dict[Value, np.ndarray] = {}
        self.live: dict[Value, np.ndarray] = {}
        self._extent: Channels = _FIRST if extents else _FIRST[:0]
        for op in graph.ops:
            channels = op.output.channels
            if channels is not None:
                known = self._constants(op) if constants else None
                self.constant[op.output] = np.full(channels, np.nan) if known is None else known
                self.live[op.output] = np.zeros(channels, dtype=bool)
        for op in reversed(graph.ops):
            # All consumers of the result have been seen.
            if op.output in self.live:
                self._leave_out_constants(op.output)
            self._read_inputs(op)

    def _leave_out_constants(self, value: Value) -> None:
        read = self.live[value]
        computed = np.isnan(self.constant[value])
        live = self.live[value] = read & computed
        if read.any() and not live.any():
            # Constants alone are read: one channel still has to tell how many pixels there are.
            live[np.argmax(computed)] = True

    def _constants(self, op: Op) -> np.ndarray | None:
        known = [self.constant.get(value) for value in op.inputs]
        if op.kind in ("conv", "depthwise"):
            return np.where(op.writes < 0, 0.0, np.nan)
        if op.kind == "norm":
            assert op.module is not None
            assert known[0] is not None
            scale, shift = folded_norm(op.module)
            return known[0] * scale.cpu().numpy() + shift.cpu().numpy()
        if op.kind == "map":
            assert known[0] is not None
            if op.elementwise:
                return self._computed(op, [known[0]])
            return np.where(known[0] == 0, 0.0, np.nan) if op.zeros else None
        if op.kind == "binary":
            return self._computed(op, [term for term in (known[0], known[-1]) if term is not None])
        if op.kind == "take":
            assert known[0] is not None
            return known[0][op.reads]
        if op.kind == "cat":
            return np.concatenate([part for part in known if part is not None])
        if op.kind == "pad":
            assert known[0] is not None
            padded = np.full(op.output.channels or 0, op.fill)
            padded[op.before : op.before + len(known[0])] = known[0]
            return padded
        return None

    @staticmethod
    def _computed(op: Op, terms: list[np.ndarray]) -> np.ndarray:
        """What the operation makes of constants, where all terms are constant."""
        certain = ~np.isnan(np.sum(terms, axis=0))
        result = np.full(len(terms[0]), np.nan)
        if certain.any():
            assert op.call is not None
            tensors = [torch.from_numpy(term[certain]).view(1, -1, 1, 1) for term in terms]
            result[certain] = op.call(*tensors).flatten().numpy()
        return result

    def _read(self, value: Value, channels: Channels | slice) -> None:
        if value in self.live:
            self.live[value][channels] = True

    def _read_inputs(self, op: Op) -> None:
        """Marks what an operation reads, given what is read of its result."""
        if op.kind in ("input", "opaque", "output"):
            for value in op.inputs:
                self._read(value, slice(None))
            return
        if op.kind == "size":
            self._read(op.inputs[0], self._extent)
            return
        live = self.live[op.output]
        if not live.any():
            return
        if op.kind == "conv":
            self._read(op.inputs[0], op.reads if len(op.reads) else self._extent)
        elif op.kind in ("depthwise", "take"):
            self._read(op.inputs[0], op.reads[live])
        elif op.kind == "grouped":
            width = op.conv.in_channels // op.conv.groups
            self._read(op.inputs[0], members(groups_of(op, np.flatnonzero(live)), width))
        elif op.kind == "cat":
            first = 0
            for value in op.inputs:
                assert value.channels is not None
                self._read(value, np.flatnonzero(live[first : first + value.channels]))
                first += value.channels
        elif op.kind == "pad":
            (value,) = op.inputs
            assert value.channels is not None
            self._read(value, np.flatnonzero(live[op.before : op.before + value.channels]))
        else:
            for value in op.inputs:
                self._read(value, np.flatnonzero(live) if value in op.aligned else slice(None))
