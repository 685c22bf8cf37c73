"""Neighbouring steps of a plan joined into one native call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from bap_kernels._load import _C
from bap_kernels.plan.steps import Env, Step

__all__ = ["Joined", "join"]

Freed = tuple[int, ...]


class Joined:
    """Steps that the library runs in a row by itself, and one by one where it cannot.

    Args:
        run: the same steps in the library.
        steps: each with the slots that are emptied after it.
    """

    def __init__(self, run: _C.StepRun, steps: Sequence[tuple[Step, Freed]]) -> None:
        self.native, self.steps = run, steps

    def __call__(self, env: Env) -> None:
        """Runs them."""
        if not torch.compiler.is_compiling() and self.native.run(env):
            return
        for step, freed in self.steps:
            step(env)
            for slot in freed:
                env[slot] = None


def join(steps: Iterable[tuple[Step, Freed]], slots: int) -> list[tuple[Callable[[Env], None], Freed]]:
    """The same steps, joined where the library knows them.

    Args:
        steps: in order, each with the slots that are emptied after it.
        slots: how many slots the plan has.
    """
    order: list[tuple[Callable[[Env], None], Freed]] = []
    run = _C.StepRun(slots)
    members: list[tuple[Step, Freed]] = []
    for step, freed in steps:
        if not step.join(run, freed):
            order.append((step, freed))
            run, members = _C.StepRun(slots), []
            continue
        if not members:
            order.append((Joined(run, members), ()))
        members.append((step, freed))
    return order
