"""Which channels of each value any consumer reads, and which of them are constants.

Constants go forward: a filter that a mask leaves out is zero everywhere, batch norm makes another constant of it, and
so on; such channels are never computed. Needs go backward: a convolution needs its in-list, a sum needs of both terms
what is needed of it, a concatenation hands each part's needs to it, an opaque step and the result need everything.
"""

from __future__ import annotations

import numpy as np
import torch

from bap_kernels.plan.graph import Channels, Graph, Op, Value, folded_norm, groups_of, members

__all__ = ["Liveness"]


class Liveness:
    """Facts about every value with channels.

    Attributes:
        constant: (C,) float64: what every pixel of the channel is; NaN where it is not one number.
        live: (C,) bool: channels that a consumer reads and that are no constants.
    """

    def __init__(self, graph: Graph, constants: bool = True) -> None:
        self.constant: dict[Value, np.ndarray] = {}
        self.live: dict[Value, np.ndarray] = {}
        for op in graph.ops:
            channels = op.output.channels
            if channels is not None:
                known = self._constants(op) if constants else None
                self.constant[op.output] = np.full(channels, np.nan) if known is None else known
                self.live[op.output] = np.zeros(channels, dtype=bool)
        for op in reversed(graph.ops):
            # All that read the result have been seen; what is constant of it is not computed.
            if op.output in self.live:
                self._settle(op.output)
            self._ask(op)

    def _settle(self, value: Value) -> None:
        asked = self.live[value]
        computed = np.isnan(self.constant[value])
        live = self.live[value] = asked & computed
        if asked.any() and not live.any():
            # Constants alone are read: one channel still has to tell how many pixels there are.
            live[np.argmax(computed)] = True

    def _constants(self, op: Op) -> np.ndarray | None:
        known = [self.constant.get(value) for value in op.inputs]
        if op.kind in ("conv", "depthwise"):
            return np.where(op.writes < 0, 0.0, np.nan)
        if op.kind == "norm":
            scale, shift = folded_norm(op.module)  # type: ignore[arg-type]
            assert known[0] is not None
            return known[0] * scale.cpu().numpy() + shift.cpu().numpy()
        if op.kind == "map":
            assert known[0] is not None
            if op.elementwise:
                return self._through(op, [known[0]])
            return np.where(known[0] == 0, 0.0, np.nan) if op.zeros else None
        if op.kind == "binary":
            return self._through(op, [one for one in (known[0], known[-1]) if one is not None])
        if op.kind == "take":
            assert known[0] is not None
            return known[0][op.reads]
        if op.kind == "cat":
            return np.concatenate([one for one in known if one is not None])
        if op.kind == "pad":
            assert known[0] is not None
            padded = np.full(op.output.channels or 0, op.fill)
            padded[op.before : op.before + len(known[0])] = known[0]
            return padded
        return None

    @staticmethod
    def _through(op: Op, known: list[np.ndarray]) -> np.ndarray:
        certain = ~np.isnan(np.sum(known, axis=0))
        result = np.full(len(known[0]), np.nan)
        if certain.any():
            assert op.call is not None
            tensors = [torch.from_numpy(one[certain]).view(1, -1, 1, 1) for one in known]
            result[certain] = op.call(*tensors).flatten().numpy()
        return result

    def ask(self, value: Value, channels: Channels | slice) -> None:
        """Notes that somebody reads these channels."""
        if value in self.live:
            self.live[value][channels] = True

    def _ask(self, op: Op) -> None:
        if op.kind in ("input", "opaque", "output"):
            for value in op.inputs:
                self.ask(value, slice(None))
            return
        if op.kind == "size":
            # Some channel must be there.
            self.ask(op.inputs[0], np.zeros(1, dtype=np.int64))
            return
        live = self.live[op.output]
        if not live.any():
            return
        if op.kind == "conv":
            # An empty list still needs the input's size.
            self.ask(op.inputs[0], op.reads if len(op.reads) else np.zeros(1, dtype=np.int64))
        elif op.kind in ("depthwise", "take"):
            self.ask(op.inputs[0], op.reads[live])
        elif op.kind == "grouped":
            width = op.conv.in_channels // op.conv.groups
            self.ask(op.inputs[0], members(groups_of(op, np.flatnonzero(live)), width))
        elif op.kind == "cat":
            first = 0
            for value in op.inputs:
                assert value.channels is not None
                self.ask(value, np.flatnonzero(live[first : first + value.channels]))
                first += value.channels
        elif op.kind == "pad":
            (value,) = op.inputs
            assert value.channels is not None
            self.ask(value, np.flatnonzero(live[op.before : op.before + value.channels]))
        else:
            for value in op.inputs:
                self.ask(value, np.flatnonzero(live) if value in op.aligned else slice(None))
