"""The tensors of a plan's steps while it is lowered: their slots, their widths, and how consumers get their channels.

A consumer gets the channels that it reads by a view where these are the first ones that are stored, else by a gather.
Tensors may have channels behind the stored ones, up to a whole number of vectors; see :mod:`bap_kernels.plan.lowering`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from bap_kernels.flow.arguments import map_leaves
from bap_kernels.flow.graph import Channels, Op, Value
from bap_kernels.plan import steps
from bap_kernels.plan.layout import Fetch, Layout
from bap_kernels.plan.steps import Slot, Step

__all__ = ["StepWriter"]


class StepWriter:
    """Collects steps and knows the slot of every value.

    Args:
        layout: what each value stores.
        device: of lists and vectors.
        multiple: channels to whose multiples a compact tensor is rounded up.
    """

    def __init__(self, layout: Layout, device: torch.device, multiple: int) -> None:
        self.layout, self.device, self.multiple = layout, device, multiple
        self.widths: dict[int, int] = {}  # of slots whose tensor has channels behind the stored ones: all of them
        self.steps: list[Step] = []
        self.slots = 0
        self.slot: dict[Value, int] = {}
        self.fetched: dict[tuple[Value, bytes, bool], int] = {}

    def new_slot(self) -> int:
        """The number of another tensor."""
        self.slots += 1
        return self.slots - 1

    def emit(self, step: Step, op: Op, stored: int | None = None, note: str = "") -> None:
        """Adds an operation's step, with what the printed table says of it."""
        step.name, step.note = op.name, note
        total = op.output.channels
        count = stored if stored is not None else len(self.layout.stored.get(op.output, ()))
        step.kept = "" if total is None else f"{count}/{total}"
        self.steps.append(step)

    def index_of(self, channels: Channels, width: int) -> Tensor | None:
        """An int32 list; None for all channels in order."""
        if np.array_equal(channels, np.arange(width)):
            return None
        return torch.from_numpy(channels.astype(np.int32)).to(self.device)

    def width(self, count: int, value: Value) -> int:
        """Channels that a tensor with so many channels of a value is stored with."""
        return count if count == value.channels else -(-count // self.multiple) * self.multiple

    def set_width(self, slot: int, width: int) -> None:
        """Notes that the last step writes channels behind the stored ones."""
        self.widths[slot] = width
        self.steps[-1].note = ", ".join(part for part in (self.steps[-1].note, f"width {width}") if part)

    def fetch(self, value: Value, channels: Channels, op: Op, wide: bool = False) -> int:
        """The slot of a tensor with these channels; with ``wide`` there may be others behind them."""
        fetch = self.layout.fetch(value, channels)
        slot, stored = self.slot[value], len(self.layout.stored[value])
        present = self.widths.get(slot, stored)
        if fetch is None and (wide or present == stored):
            return slot
        key = (value, channels.tobytes(), wide)
        if key not in self.fetched:
            self.fetched[key] = self._fetched(fetch or Fetch(np.arange(stored), np.zeros(0), None), value, op, wide)
        return self.fetched[key]

    def _fetched(self, fetch: Fetch, value: Value, op: Op, wide: bool) -> int:
        slot, out = self.slot[value], self.new_slot()
        present = self.widths.get(slot, len(self.layout.stored[value]))
        positions, fill, order = fetch.positions, fetch.fill, fetch.order
        count = len(positions) + len(fill)
        width = self.width(count, value) if wide else count
        begin, more = fetch.begin, width - count
        whole_view = begin is not None and order is None and len(positions) < present
        if whole_view and not (more and len(fill)) and begin + len(positions) + more <= present:  # type: ignore[operator]
            self.emit(steps.ViewStep(slot, len(positions) + more, out, begin or 0), op, len(positions))
            slot, out, index = out, (self.new_slot() if len(fill) else out), None
        else:
            # Whatever is behind: a channel once more, or zeros.
            if order is not None:
                order = np.append(order, np.repeat(order[:1], more))
            elif len(fill):
                fill = np.append(fill, np.zeros(more))
            else:
                positions = np.append(positions, np.repeat(positions[:1], more))
            index = self.index_of(positions, present)
        if index is not None or len(fill) or order is not None:
            zeros = len(fill) if not fill.any() else None
            constants = zeros if zeros else (torch.from_numpy(fill).to(self.device) if len(fill) else None)
            places = None if order is None else self.index_of(order, len(positions) + len(fill))
            self.emit(steps.FetchStep(index, constants, places, slot, out), op, count)
        if more:
            self.set_width(out, width)
        return out

    def whole(self, value: Value, op: Op) -> int:
        """The slot of a tensor with all channels, in the dense network's order."""
        channels = value.channels
        return self.slot[value] if channels is None else self.fetch(value, np.arange(channels), op)

    def more_positions(self, positions: Channels, stored: int, present: int, value: Value) -> Channels:
        """Positions in a tensor, followed by others of it up to a whole number of vectors, if there are as many."""
        if len(positions) == stored:
            return np.arange(present)
        unread = np.setdiff1d(np.arange(stored), positions)
        # Those behind the stored ones first: nobody's numbers can be infinite there.
        others = np.concatenate([np.arange(stored, present), unread])
        return np.concatenate([positions, others[: self.width(len(positions), value) - len(positions)]])

    def with_slots(self, op: Op, part: Any) -> Any:
        """Arguments in which values are replaced by slots of all their channels, in the dense network's order."""
        return map_leaves(part, lambda leaf: Slot(self.whole(leaf, op)) if isinstance(leaf, Value) else leaf)
