"""A flat list of steps over slots, each slot emptied after the last step that reads it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bap_kernels.plan.chunks import Chunks, held_bytes
from bap_kernels.plan.joined import join
from bap_kernels.plan.steps import MapStep, Step, fill_slots, slots_in

__all__ = ["Program"]


class Program:
    """Steps in order.

    Args:
        steps: what to run.
        slots: how many slots there are.
        inputs: the slots of the inputs.
        result: what to return, with slots for the tensors.
    """

    def __init__(self, steps: list[Step], slots: int, inputs: list[int], result: Any) -> None:
        self.steps = steps
        self.slots = slots
        self.inputs = inputs
        self.result = result
        returned = slots_in(result)
        consumers: dict[int, int] = {}
        last: dict[int, int] = {}
        for number, step in enumerate(steps):
            for slot in dict.fromkeys((*step.reads, *step.writes)):
                last[slot] = number
            for slot in set(step.reads):
                consumers[slot] = consumers.get(slot, 0) + 1
        fresh = {step.out for step in steps if step.fresh}
        for step in steps:
            # Nothing else sees the input: views are not fresh.
            alone = step.reads and consumers[step.reads[0]] == 1 and step.reads[0] not in returned
            if isinstance(step, MapStep) and step.reads[0] in fresh and alone:
                step.reuse_input()
        freed: list[list[int]] = [[] for _ in steps]
        for slot, number in last.items():
            if slot not in returned:
                freed[number].append(slot)
        self.freed = [tuple(slots) for slots in freed]
        self._order = list(zip(steps, self.freed, strict=True))
        self._chunks = Chunks(steps, self.freed, inputs, slots)
        # Of the steps behind those that chunks may take, and of all steps.
        leading = self._chunks.end
        self._joined = {0: join(self._order, slots), leading: join(self._order[leading:], slots)}
        # Its results for two and for three samples, without data; known after the first mixed batch.
        self.probe: tuple[Any, Any] | None = None

    @property
    def counts_first(self) -> bool:
        """Whether the next run goes step by step, to count bytes; later runs join steps."""
        return not self._chunks.counted

    def run(self, inputs: tuple[Any, ...]) -> Any:
        """Computes the result."""
        env: list[Any] = [None] * self.slots
        for slot, x in zip(self.inputs, inputs, strict=True):
            env[slot] = x
        for step, freed in self._joined[self._run_leading(env)]:
            step(env)
            for slot in freed:
                env[slot] = None
        return fill_slots(self.result, env)

    def _run_leading(self, env: list[Any]) -> int:
        """Runs the first steps where that may be in chunks, and returns how many it ran: all of these or none."""
        chunks = self._chunks
        if torch.compiler.is_compiling():
            return 0
        # Another thread may find out meanwhile that batches cannot be cut.
        leading = chunks.end
        if not chunks.counted:
            chunks.count(env)
            return leading
        size = chunks.size(env)
        return leading if size and chunks.run(env, size) else 0

    def peak_bytes(self, inputs: tuple[Any, ...]) -> int:
        """Most bytes of inputs and results that an uncut batch holds at once, found on tensors without data."""
        peak = 0
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            env: list[Any] = [None] * self.slots
            for slot, x in zip(self.inputs, inputs, strict=True):
                env[slot] = mode.from_tensor(x) if isinstance(x, Tensor) else x
            for step, freed in self._order:
                step(env)
                peak = max(peak, held_bytes(env))
                for slot in freed:
                    env[slot] = None
        return peak

    def table(self) -> str:
        """One line a step."""
        rows = [("step", "kind", "layer", "kept", "")]
        rows += [(str(n), step.kind, step.name, step.kept, step.note) for n, step in enumerate(self.steps)]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = []
        for row in rows:
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
            lines.append("  ".join([*cells, row[4]]).rstrip())
        return "\n".join(lines)
