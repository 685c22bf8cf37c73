"""Bytes that a network of several domains holds: parameters, what plans copy, packed weights, activations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from bap_kernels._load import _C
from bap_kernels.channels import ChannelLists
from bap_kernels.nn.conv import GatheredConv2d
from bap_kernels.plan.conv_steps import ConvStep
from bap_kernels.plan.steps import Step

__all__ = ["LayerMemory", "NetworkMemory", "PackedUse", "layer_uses", "network_memory", "step_uses"]

Lists = tuple[Tensor | None, Tensor | None, Tensor | None]


class PackedUse(NamedTuple):
    """One use of a weight: in which layer and domain, with which lists (in, out, and the weight's own in-list)."""

    layer: str
    domain: str | None
    weight: Tensor
    lists: Lists


@dataclass(frozen=True)
class LayerMemory:
    """Bytes of one layer's weight and its packed forms.

    Attributes:
        name: as in ``model.named_modules()``.
        weight: the parameter.
        packed: {domain: packed for its lists alone}.
        packed_shared: packed for several domains, or for the lists of any.
    """

    name: str
    weight: int
    packed: Mapping[str | None, int]
    packed_shared: int


@dataclass(frozen=True)
class NetworkMemory:
    """Bytes that a network holds now; printing it shows a table.

    What is packed depends on what has run: a weight is packed at the first use in a domain, and dropped when it changes
    or when ``BAP_KERNELS_PACKED_CACHE_BYTES`` is reached. Working memory of kernels, recorded CUDA graphs and what
    other libraries keep are not counted.

    Attributes:
        parameters: parameters and buffers of the model, memory that several of them share once.
        copies: {domain: lists, and filters and norms that its plan has copied}; None stands for no domain.
        packed: {domain: packed weights that it alone uses}.
        packed_shared: packed weights that several domains use, or that serve the lists of any.
        packed_unused: packed weights for lists that no domain has now.
        activations: most bytes of activations held at once by the active domain's plan, for the example; None for
            a network without a plan.
        layers: the layers whose weights may be packed.
    """

    parameters: int
    copies: Mapping[str | None, int]
    packed: Mapping[str | None, int]
    packed_shared: int
    packed_unused: int
    activations: int | None
    layers: tuple[LayerMemory, ...] = field(default=(), repr=False)

    @property
    def weights(self) -> int:
        """All of it without activations."""
        packed = sum(self.packed.values()) + self.packed_shared + self.packed_unused
        return self.parameters + sum(self.copies.values()) + packed

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + (self.activations or 0)

    def __str__(self) -> str:
        rows = [("parameters and buffers", self.parameters)]
        for domain in sorted({*self.copies, *self.packed}, key=lambda name: (name is not None, str(name))):
            name = "no domain" if domain is None else repr(domain)
            rows.append((f"copied for {name}", self.copies.get(domain, 0)))
            rows.append((f"packed for {name}", self.packed.get(domain, 0)))
        rows.append(("packed for several domains", self.packed_shared))
        rows.append(("packed for other lists", self.packed_unused))
        if self.activations is not None:
            rows.append(("activations", self.activations))
        rows = [row for row in rows if row[1]] + [("total", self.total)]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name.ljust(width)}  {count / 2**20:10.3f} MiB" for name, count in rows)


def layer_uses(model: nn.Module) -> list[PackedUse]:
    """The uses of weights by swapped layers, in every domain and as they are now."""
    uses: list[PackedUse] = []
    for name, layer in model.named_modules():
        if isinstance(layer, GatheredConv2d):
            states: dict[str | None, ChannelLists] = dict(layer.lists.items())
            if not any(lists is layer.channels for lists in states.values()):
                states[None] = layer.channels
            for domain, lists in states.items():
                uses.append(PackedUse(name, domain, layer.weight, (lists.in_index, lists.out_index, None)))
    return uses


def step_uses(domain: str | None, steps: Iterable[Step]) -> list[PackedUse]:
    """The uses of weights by a plan's steps."""
    convs = (step for step in steps if isinstance(step, ConvStep))
    return [
        PackedUse(step.name, domain, step.parameters["weight"], (step.in_index, step.out_index, step.weight_index))
        for step in convs
    ]


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for part in value for tensor in _tensors(part)] if isinstance(value, (list, tuple)) else []


class _Storages:
    """Counts each storage once."""

    def __init__(self) -> None:
        self.seen: set[int] = set()

    def bytes_of(self, tensors: Iterable[Tensor]) -> int:
        count = 0
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self.seen:
                self.seen.add(storage._cdata)
                count += storage.nbytes()
        return count


def network_memory(
    model: nn.Module,
    uses: Iterable[PackedUse],
    plans: Iterable[tuple[str | None, list[Step]]] = (),
    activations: int | None = None,
) -> NetworkMemory:
    """Counts what is held.

    Args:
        model: the network.
        uses: of its weights.
        plans: (domain, steps) of each of its plans.
        activations: of the active plan.
    """
    uses, storages = list(uses), _Storages()
    parameters = storages.bytes_of((*model.parameters(), *model.buffers()))
    copies: dict[str | None, int] = {}
    for use in uses:
        copies[use.domain] = copies.get(use.domain, 0) + storages.bytes_of(_tensors(use.lists))
    for domain, steps in plans:
        copies[domain] = copies.get(domain, 0) + storages.bytes_of(_tensors([vars(step) for step in steps]))
    copies = {domain: count for domain, count in copies.items() if count}

    layers: dict[str, list[PackedUse]] = {}
    for use in uses:
        layers.setdefault(use.layer, []).append(use)
    rows: list[LayerMemory] = []
    # Layers that share a weight share what is packed.
    counted: set[int] = set()
    unused = 0
    for name, own in layers.items():
        kept: dict[int, int] = {}
        users: dict[int, set[str | None]] = {}
        for use in own:
            for lists in (use.lists, (None, use.lists[1], None)):
                for number, count, matches in _C.kept_packed(use.weight, *lists):
                    if number not in counted:
                        kept[number] = count
                        users.setdefault(number, set()).update([use.domain] if matches else [])
        counted |= kept.keys()
        packed: dict[str | None, int] = {}
        shared = 0
        for number, domains in users.items():
            if len(domains) == 1:
                domain = next(iter(domains))
                packed[domain] = packed.get(domain, 0) + kept[number]
            elif domains:
                shared += kept[number]
            else:
                unused += kept[number]
        weights = {id(use.weight): use.weight for use in own}.values()
        rows.append(LayerMemory(name, _Storages().bytes_of(weights), packed, shared))
    total: dict[str | None, int] = {}
    for row in rows:
        for domain, count in row.packed.items():
            total[domain] = total.get(domain, 0) + count
    return NetworkMemory(
        parameters, copies, total, sum(row.packed_shared for row in rows), unused, activations, tuple(rows)
    )
