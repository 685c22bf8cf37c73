"""A flat list of steps over slots, each slot emptied after its last reader."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bap_kernels.plan.steps import MapStep, Step, put_in

__all__ = ["Program"]


def _tensors_in(part: Any) -> list[Tensor]:
    if isinstance(part, Tensor):
        return [part]
    if isinstance(part, dict):
        part = list(part.values())
    return [one for item in part for one in _tensors_in(item)] if isinstance(part, (list, tuple)) else []


class Program:
    """Steps in order.

    Args:
        steps: what to run.
        slots: how many slots there are.
        inputs: the slots of the inputs.
        result: what to return, with slots in the tensors' places.
        returned: the slots in it.
    """

    def __init__(self, steps: list[Step], slots: int, inputs: list[int], result: Any, returned: list[int]) -> None:
        self.steps = steps
        self.slots = slots
        self.inputs = inputs
        self.result = result
        readers: dict[int, int] = {}
        last: dict[int, int] = {}
        for number, step in enumerate(steps):
            for slot in dict.fromkeys((*step.reads, *step.writes)):
                last[slot] = number
            for slot in set(step.reads):
                readers[slot] = readers.get(slot, 0) + 1
        fresh = {step.out for step in steps if step.fresh}
        for step in steps:
            # Nothing else sees the input, as no view is fresh.
            alone = step.reads and readers[step.reads[0]] == 1 and step.reads[0] not in returned
            if isinstance(step, MapStep) and step.reads[0] in fresh and alone:
                step.reuse_input()
        freed: list[list[int]] = [[] for _ in steps]
        for slot, number in last.items():
            if slot not in returned:
                freed[number].append(slot)
        self.freed = [tuple(slots) for slots in freed]
        self._order = list(zip(steps, self.freed, strict=True))
        # What it gives for two and for three samples, without data; known after the first mixed batch.
        self.probe: tuple[Any, Any] | None = None

    def run(self, inputs: tuple[Any, ...]) -> Any:
        """Computes the result."""
        env: list[Any] = [None] * self.slots
        for slot, x in zip(self.inputs, inputs, strict=True):
            env[slot] = x
        for step, freed in self._order:
            step(env)
            for slot in freed:
                env[slot] = None
        return put_in(self.result, env)

    def peak_bytes(self, inputs: tuple[Any, ...]) -> int:
        """Most bytes of inputs and results that are held at once, found on tensors without data."""
        peak = 0
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            env: list[Any] = [None] * self.slots
            for slot, x in zip(self.inputs, inputs, strict=True):
                env[slot] = mode.from_tensor(x) if isinstance(x, Tensor) else x
            for step, freed in self._order:
                step(env)
                held = {one.untyped_storage()._cdata: one.untyped_storage().nbytes() for one in _tensors_in(env)}
                peak = max(peak, sum(held.values()))
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
