"""Bytes that one network holds for 1, 3 and 10 domains, planned or layer by layer, with each setting of packed memory.

Counted by ``bk.memory`` after every domain ran once with the native kernels, so that nothing depends on time or on what
else the machine does.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benches import ours
from benches.network_models import FEW_CHANNELS

COUNTS = (1, 3, 10)
KINDS = ("planned", "swapped")
MEMORY = ("fast", "auto", "shared")


@dataclass(frozen=True)
class Held:
    """One row: bytes after so many domains ran.

    Args:
        kind: Of `KINDS`.
        memory: Of `MEMORY`.
        domains: Number of domains that ran.
        parameters: Bytes of parameters and buffers.
        copies: Bytes of lists and of what plans copy.
        packed: Bytes of packed weights.
    """

    kind: str
    memory: str
    domains: int
    parameters: int
    copies: int
    packed: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.copies + self.packed


def held_memory(
    model: nn.Module, x: torch.Tensor, density: float, counts: Sequence[int] = COUNTS, winograd: int = 0
) -> Iterator[Held]:
    """Yield the rows of all kinds.

    Args:
        model: The dense network, which is swapped in place.
        x: Its input.
        density: Share of the channels that each domain keeps, drawn for every layer.
        counts: Numbers of domains, rising.
        winograd: 4 or 2: 3 x 3 layers of stride 1 by Winograd kernels of that size; 0: by direct ones.
    """
    bk, library = ours.package(), ours.library()
    names = [f"domain{number}" for number in range(counts[-1])]
    bk.swap_(model, lambda layer, name: layer.in_channels > FEW_CHANNELS)
    bk.attach_(model, bk.ChannelTable.random(model, names, density, 0))
    before = library.get_packed_memory()
    library.force_winograd(winograd)
    try:
        with torch.no_grad(), bk.use_backend("native"):
            for kind in KINDS:
                for memory in MEMORY:
                    library.clear_packed_cache()
                    library.set_packed_memory(memory)
                    yield from _rows(kind, memory, model, x, names, counts)
    finally:
        library.force_winograd(0)
        library.set_packed_memory(before)
        library.clear_packed_cache()


def _rows(
    kind: str, memory: str, model: nn.Module, x: torch.Tensor, names: Sequence[str], counts: Sequence[int]
) -> Iterator[Held]:
    bk = ours.package()
    served: Any = bk.plan(model, x, names[0], check=False, memory=memory) if kind == "planned" else model
    for number, name in enumerate(names, 1):
        bk.set_domain(served, name)
        served(x)
        if number in counts:
            held = bk.memory(served)
            copies = sum(held.copies.values())
            yield Held(kind, memory, number, held.parameters, copies, held.weights - held.parameters - copies)


def table(rows: Sequence[Held]) -> str:
    """Return the rows as a Markdown table, in MiB, with the ratio to one domain."""
    lines = [
        "| | memory | domains | parameters | copies | packed | total | of one domain |",
        "|---|---|---|---|---|---|---|---|",
    ]
    one = {(row.kind, row.memory): row.total for row in reversed(rows)}
    for row in rows:
        sizes = (row.parameters, row.copies, row.packed, row.total)
        cells = [row.kind, row.memory, str(row.domains), *(f"{size / 2**20:.1f}" for size in sizes)]
        lines.append("| " + " | ".join([*cells, f"{row.total / one[row.kind, row.memory]:.2f}"]) + " |")
    return "\n".join(lines)
