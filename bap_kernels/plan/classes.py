"""Which channels of a network's values go together, for what changes a model in place.

Every channel of every value is an element. Elements that must go together (through batch norms, activations, sums,
concatenations, a layer used twice) are one class.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
from torch import Tensor, nn

from bap_kernels.nn.conv import GatheredConv2d, MaskedConv2d
from bap_kernels.nn.per_domain import domain_layers
from bap_kernels.nn.switched import SwitchedConv2d
from bap_kernels.plan.graph import Channels, Graph, Op, Value
from bap_kernels.plan.operations import Call

__all__ = ["Classes", "domains_to_change", "keep_unknown", "tied", "unknown"]


class Classes:
    """Union-find over the channels of all values.

    Attributes:
        first: {value: number of its first element}, in the graph's order.
        kept: (elements,) bool, what :meth:`keep` marked.
    """

    def __init__(self, graph: Graph) -> None:
        self.first: dict[Value, int] = {}
        count = 0
        for value in graph.values:
            if value.channels is not None:
                self.first[value] = count
                count += value.channels
        self.leader = np.arange(count)
        self.kept = np.zeros(count, dtype=bool)

    def find(self, element: int) -> int:
        """The element that stands for the class."""
        while self.leader[element] != element:
            self.leader[element] = self.leader[self.leader[element]]
            element = self.leader[element]
        return element

    def leaders(self) -> np.ndarray:
        """Of every element, what stands for its class."""
        return np.array([self.find(element) for element in range(len(self.leader))], dtype=np.int64)

    def tie(self, a: Value, b: Value, begin: int = 0) -> None:
        """Channel j of ``a`` goes with channel ``begin + j`` of ``b``."""
        for channel in range(a.channels or 0):
            self.leader[self.find(self.first[a] + channel)] = self.find(self.first[b] + begin + channel)

    def tie_groups(self, a: Value, b: Value, groups: int) -> None:
        """All channels of a group of ``a`` go with the first one of that group of ``b``."""
        size_a, size_b = ((value.channels or 0) // groups for value in (a, b))
        for channel in range(size_a * groups):
            self.leader[self.find(self.first[a] + channel)] = self.find(self.first[b] + channel // size_a * size_b)

    def keep(self, value: Value, channels: Channels | slice) -> None:
        """Marks channels of a value; others are no concern of this."""
        if value in self.first:
            self.kept[self.first[value] + np.arange(value.channels or 0)[channels]] = True

    def marked(self, leaders: np.ndarray, value: Value) -> np.ndarray:
        """What stands for the classes of a value's channels.

        Args:
            leaders: of :meth:`leaders`.
            value: the value.
        """
        first = self.first.get(value, 0)
        return leaders[first : first + (value.channels or 0)] if value in self.first else leaders[:0]

    def settle(self) -> None:
        """Marks whole classes where one of their elements is marked."""
        leaders = self.leaders()
        stays = np.zeros(len(leaders), dtype=bool)
        stays[leaders[self.kept]] = True
        self.kept = stays[leaders]

    def of(self, value: Value) -> Channels:
        """Numbers of the marked channels."""
        first = self.first[value]
        return np.flatnonzero(self.kept[first : first + (value.channels or 0)])


def tied(graph: Graph) -> Classes:
    """The classes of a network, nothing marked."""
    classes = Classes(graph)
    used: dict[nn.Module, Op] = {}
    for op in graph.ops:
        for value in op.inputs if op.kind == "depthwise" else op.aligned:
            classes.tie(value, op.output)
        if op.kind == "grouped":
            # A group goes as a whole.
            for value in (op.inputs[0], op.output):
                classes.tie_groups(value, op.output, op.conv.groups)
        elif op.kind == "cat":
            begin = 0
            for value in op.inputs:
                classes.tie(value, op.output, begin)
                begin += value.channels or 0
        elif op.kind == "pad":
            classes.tie(op.inputs[0], op.output, op.before)
        if op.module is not None:
            first = used.setdefault(op.module, op)
            if first is not op:
                classes.tie(first.inputs[0], op.inputs[0])
                classes.tie(first.output, op.output)
    return classes


def _held_elsewhere(graph: Graph) -> set[int]:
    """Ids of the tensors that steps without a rule hold: those of their module, or one that the model's code names."""
    held: set[int] = set()
    for op in graph.ops:
        if op.kind == "opaque" and isinstance(op.call, Call):
            if isinstance(op.call.target, nn.Module):
                held.update(id(one) for one in (*op.call.target.parameters(), *op.call.target.buffers()))
            held.update(id(one) for one in op.call.args if isinstance(one, Tensor))
    return held


def keep_unknown(classes: Classes, graph: Graph, free: Collection[Op] = (), widths: bool = False) -> None:
    """Marks what the model's own code decides: the channels around steps without a rule, inputs and results.

    Args:
        classes: gets the marks.
        graph: the network.
        free: steps without a rule around which nothing is marked.
        widths: mark what the model's code asks the number of channels of, too.
    """
    for op, values, _ in unknown(graph, widths):
        for value in () if op in free else values:
            classes.keep(value, slice(None))


def unknown(graph: Graph, widths: bool = False) -> Iterator[tuple[Op, list[Value], str]]:
    """The steps whose channels must stay: (step, the values whose channels these are, why)."""
    held = _held_elsewhere(graph)
    for op in graph.ops:
        # A layer that a step without a rule has as well.
        stores = () if op.module is None else (*op.module._parameters.values(), *op.module._buffers.values())
        around = [*op.inputs, op.output]
        if op.kind in ("input", "output"):
            yield op, around, f"it is the model's {op.kind}"
        elif op.kind == "opaque":
            yield op, around, f"{op.call!r} has no rule"
        elif op.kind == "take":
            yield op, around, "the model's code takes channels by their numbers"
        elif op.fixed:
            yield op, around, "its filters are computed, or made for a number of channels"
        elif any(id(one) in held for one in stores):
            yield op, around, "a step without a rule has its parameters, too"
        elif widths and op.kind == "size" and op.tells_channels:
            yield op, around, "the model's code asks for the number of channels"
        elif op.others:
            yield op, op.others, "it is the same for all channels"


def domains_to_change(op: str, model: nn.Module) -> list[str | None]:
    """The domains of a model whose channels can be dropped or moved in place; [None] if it has none.

    Args:
        op: the caller's name, for messages.
        model: a swapped network.

    Raises:
        ValueError: if no layer was swapped, a mixed batch is set, or layers have other domains than the lists.
        NotImplementedError: for out-lists in layers whose result is compact, for parameters in two layers, and for
            switched layers.
    """
    layers = {name: one for name, one in model.named_modules() if isinstance(one, GatheredConv2d)}
    if not layers:
        raise ValueError(f"{op}(): expected `model` to have swapped layers, got none. Hint: call swap_ first.")
    if any(module.__dict__.get("_mixed") is not None for module in model.modules()):
        raise ValueError(
            f"{op}(): expected `model` to be set to one domain, got a mixed batch. Hint: call set_domain with a name."
        )
    for name, layer in layers.items():
        narrow = not isinstance(layer, MaskedConv2d)
        if narrow and any(one.out_index is not None for one in (layer.channels, *layer.lists.values())):
            raise NotImplementedError(
                f"{op}(): expected out-lists only in MaskedConv2d, got layer {name!r}, whose result has "
                "another width in each domain. Hint: swap_(model, layer_type=MaskedConv2d)."
            )
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None and owners.setdefault(id(parameter), name) != name:
                raise NotImplementedError(
                    f"{op}(): expected each parameter in one layer, got one in {owners[id(parameter)]!r} "
                    f"and in {name!r}."
                )
    domains = list(dict.fromkeys(domain for layer in layers.values() for domain in layer.lists))
    for name, owner in domain_layers(model):
        if isinstance(owner, SwitchedConv2d):
            raise NotImplementedError(
                f"{op}(): expected layers with fixed lists, got the switched layer {name!r}. "
                "Hint: call swap_, which gives it the lists of its switches."
            )
    for name, owner in domain_layers(model):
        if set(owner.domains) != set(domains):
            raise ValueError(
                f"{op}(): expected layer {name!r} to have the lists' domains {domains}, got {list(owner.domains)}."
            )
    return [*domains] or [None]
