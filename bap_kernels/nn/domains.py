"""Gives the layers of a model their lists, and switches between domains."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, TypeAlias
from weakref import ReferenceType, WeakKeyDictionary, ref

from torch import Tensor, nn

from bap_kernels._arguments import check_module
from bap_kernels._masks import Widths
from bap_kernels.channels import ChannelLists
from bap_kernels.layer_kinds import NEVER, DomainLayer, PlannedModel, change_now
from bap_kernels.nn.conv import GatheredConv2d
from bap_kernels.nn.mixed import MixedBatch, MixedStates, mixed_numbers
from bap_kernels.nn.per_domain import PerDomain, domain_layers
from bap_kernels.nn.swap import unswappable_reason
from bap_kernels.table import ChannelTable

__all__ = ["attach_", "domain_names", "set_domain"]

_DENSE = ChannelLists()


# A layer that depends on the domain: its attributes, the name of that with the state, {domain: state}, and (the state
# without a domain,) or None where it needs one. A dictionary stands for the module: the model must not be kept alive,
# and assigning through nn.Module is slow. All of this is unpacked at every switch: a plain tuple is the fastest.
_Layer: TypeAlias = tuple[dict[str, Any], str, dict[Any, Any], tuple[Any] | None]


class _Layers:
    """The layers of one model that depend on the domain, with what tells that the model has changed."""

    def __init__(self, model: nn.Module) -> None:
        # Of gathered layers, whose lists may be attached anew, and of the others; `states` of the first is empty.
        self.gathered: list[_Layer] = []
        self.owning: list[_Layer] = []
        self.parents: list[tuple[dict[str, Any], tuple[nn.Module | None, ...]]] = []
        self.leaves: list[dict[str, Any]] = []
        self.planned: list[ReferenceType[PlannedModel]] = []
        # Once for each model: lists are often made before torch.compile is loaded.
        self.marked = False
        seen: set[nn.Module] = set()
        waiting = [model]
        while waiting:
            module = waiting.pop()
            if module in seen:
                continue
            seen.add(module)
            if isinstance(module, PlannedModel):
                self.planned.append(ref(module))
                continue
            children = module._modules
            if isinstance(module, DomainLayer):
                without = None if module._needs_domain else (module._without_domain,)
                modules = module.domains._modules if isinstance(module, PerDomain) else {}
                kind = self.owning if isinstance(module, PerDomain) else self.gathered
                kind.append((module.__dict__, module._state_name, modules, without))
            if children:
                self.parents.append((children, tuple(children.values())))
            else:
                self.leaves.append(children)
            # What is inside a domain's module cannot depend on the domain, and there may be very many of them.
            if not isinstance(module, PerDomain):
                waiting += [child for child in children.values() if child is not None]

    def with_states(self) -> list[_Layer]:
        """The layers that have domains: gathered ones that a table was attached to, then the others."""
        attached: list[_Layer] = [
            (attributes, state_name, attributes["lists"], without)
            for attributes, state_name, _, without in self.gathered
            if attributes["lists"]
        ]
        return attached + self.owning

    def fits(self) -> bool:
        # Tuples compare by identity first, so this is one quick pass over the module tree.
        return not any(self.leaves) and all(tuple(children.values()) == known for children, known in self.parents)

    def planned_networks(self, model: nn.Module) -> list[PlannedModel]:
        """The planned networks in the model that depend on the domain; a model that is one itself always counts."""
        networks = [network for network in (reference() for reference in self.planned) if network is not None]
        return [network for network in networks if network is model or domain_names(network)]

    def mark_dynamic(self) -> None:
        """Tells torch.compile which sizes vary between domains."""
        for attributes, *_ in self.gathered:
            for lists in attributes["lists"].values():
                lists.mark_dynamic()
        self.marked = True


_layers_of: WeakKeyDictionary[nn.Module, _Layers] = WeakKeyDictionary()


def _layers(model: nn.Module) -> _Layers:
    known = _layers_of.get(model)
    if known is None or not known.fits():
        known = _layers_of[model] = _Layers(model)
    if not known.marked and "torch._dynamo" in sys.modules:
        known.mark_dynamic()
    return known


def attach_(model: nn.Module, table: ChannelTable | Mapping[str, Mapping[str, ChannelLists]]) -> nn.Module:
    """Gives every swapped layer its lists for every domain of a table; earlier lists go.

    A layer that a domain does not name keeps all of its channels there. Until :func:`bap_kernels.set_domain` is called
    every layer keeps all of its channels. Domains are numbered in the order of the table, or as the model's batch norms
    and classifiers number them; see :func:`bap_kernels.domain_names`.

    Args:
        model: a model that went through :func:`bap_kernels.swap_`.
        table: the lists, under the names of ``model.named_modules()``.

    Returns:
        ``model``.

    Raises:
        ValueError: if no layer was swapped, or the table names layers that are not there or were not swapped, or gives
            a depthwise layer two different lists. Nothing is changed if an error is raised.
        IndexError: if a list names a channel that its layer does not have.

    Examples:
        >>> from torch import nn
        >>> import bap_kernels as bk
        >>> model = bk.swap_(nn.Sequential(nn.Conv2d(8, 8, 3)))
        >>> bk.set_domain(bk.attach_(model, bk.ChannelTable.random(model, ["birds", "cars"], 0.5)), "cars")
        >>> model
        Sequential(
          (0): GatheredConv2d(8, 8, kernel_size=(3, 3), stride=(1, 1), reads 4/8)
        )
    """
    check_module("attach_", model)
    table = _in_order(model, table if isinstance(table, ChannelTable) else ChannelTable(table))
    modules = dict(model.named_modules(remove_duplicate=False))
    layers = {name: module for name, module in modules.items() if isinstance(module, GatheredConv2d)}
    if not layers:
        raise ValueError("attach_(): expected `model` to have swapped layers, got none. Hint: call swap_(model) first.")
    lists: dict[GatheredConv2d, dict[str, ChannelLists]] = {
        layer: dict.fromkeys(table, _DENSE) for layer in layers.values()
    }
    for domain, named in table.items():
        given: dict[GatheredConv2d, str] = {}
        for name, its_lists in named.items():
            layer = layers.get(name)
            if layer is None:
                raise ValueError(_unknown_layer(domain, name, modules.get(name), list(layers)))
            its_lists.validate_for(layer, name)
            _check_widths(domain, name, layer, table._widths.get((domain, name), (None, None)))
            # A layer that is used in two places has two names.
            if layer in given and its_lists != lists[layer][domain]:
                raise ValueError(
                    f"attach_(): expected one list for the layer that is both {given[layer]!r} and {name!r}, "
                    f"got two in domain {domain!r}."
                )
            given[layer] = name
            lists[layer][domain] = its_lists
    for layer, domains in lists.items():
        layer.attach(domains)
    return model


def _in_order(model: nn.Module, table: ChannelTable) -> ChannelTable:
    """The table with its domains in the order of the model's own, so that numbers have one meaning."""
    own = next((layer.domains for _, layer in domain_layers(model)), None)
    if own is None:
        return table
    order = [domain for domain in own if domain in table]
    ordered = ChannelTable({domain: table[domain] for domain in dict.fromkeys([*order, *table])})
    ordered._widths = table._widths
    return ordered


def _check_widths(domain: str, name: str, layer: GatheredConv2d, widths: Widths) -> None:
    """Compares a layer with the mask that its lists come from: too short a one would pass for a list."""
    for what, masked, channels in zip(("in", "out"), widths, (layer.in_channels, layer.out_channels), strict=True):
        if masked is not None and masked != channels:
            raise ValueError(
                f"attach_(): expected `table` to come from masks of {channels} {what}put channels for layer {name!r} "
                f"in domain {domain!r}, got {masked}."
            )


def _unknown_layer(domain: str, name: str, module: nn.Module | None, known: list[str]) -> str:
    if module is None:
        reason = f"which is not in the model. Hint: its layers are {', '.join(known[:4])}{', ...' * (len(known) > 4)}"
    elif unswappable_reason(module) is None:
        reason = "which was not swapped. Hint: call swap_ on it, or leave it out of the table"
    else:
        reason = f"which cannot be swapped: {unswappable_reason(module)}. Hint: leave it out of the table"
    return f"attach_(): expected `table` to name swapped layers, got {name!r} in domain {domain!r}, {reason}."


def set_domain(model: nn.Module, name: str | Tensor | None) -> None:
    """Makes every layer of a model work for one domain, or for a batch of several: lists, switches, norm, classifier.

    Gathered layers that no table was attached to keep the lists that they were made with.

    For a mixed batch, ``name`` holds one domain number per sample. Every layer then takes batches of just these samples
    in their order, and computes each with its domain's channels, batch norm and classifier. Samples keep their places
    throughout, so a model may do with its batch, and return, whatever it likes. A layer that gets another number of
    samples than there are numbers raises. Layers must give every domain as many channels, so out-lists need
    :class:`~bap_kernels.nn.MaskedConv2d`; classifiers with fewer outputs than the largest are filled up with -inf. A
    batch whose samples are sorted by domain is the fastest.

    A domain stays until the next call, also for a part of the model alone. A backward that computes a forward again,
    as :func:`torch.utils.checkpoint.checkpoint` does, raises if the domain was set in between;
    :func:`bap_kernels.nn.recompute` remembers it.

    Args:
        model: a model that went through :func:`bap_kernels.attach_` or :func:`bap_kernels.nn.switch_`.
        name: the domain; None makes every convolution keep all of its channels, and is refused by a model with layers
            that need a domain, which are batch norm and classifiers. For a mixed batch: (N,), int64, indices
            into :func:`bap_kernels.domain_names`.

    Raises:
        ValueError: if no layer depends on the domain, or one does not have that domain, or numbers are not 1-D.
            Nothing is changed then.
        TypeError: for numbers of another dtype.
        IndexError: for numbers that no domain has.

    Examples:
        >>> import torch
        >>> import bap_kernels as bk
        >>> model = bk.swap_(torch.nn.Sequential(torch.nn.Conv2d(8, 4, 3)))
        >>> model = bk.attach_(model, bk.ChannelTable.random(model, ["birds", "cars"], 0.5)).eval()
        >>> bk.set_domain(model, torch.tensor([1, 0, 1]))
        >>> model(torch.randn(3, 8, 5, 5)).shape
        torch.Size([3, 4, 3, 3])
    """
    check_module("set_domain", model)
    known = _layers(model)
    layers = known.with_states()
    planned = known.planned_networks(model) if known.planned else []
    if not (layers or planned):
        raise ValueError(
            "set_domain(): expected `model` to have lists, got none. Hint: call swap_, then attach_; or nn.switch_."
        )
    if isinstance(name, Tensor):
        _set_mixed(layers, planned, name)
        return
    try:
        if name is None:
            # Where None is not allowed it is looked up, and refused as an unknown name is.
            new = [states[None] if without is None else without[0] for _, _, states, without in layers]
        else:
            new = [states[name] for _, _, states, _ in layers]
    except (KeyError, TypeError):
        tables = [states for _, _, states, _ in layers]
        message = f"set_domain(): expected `name` to be one of {_known(tables)}, got {name!r}."
        raise ValueError(message) from None
    # Plans are made here, which may fail; nothing has changed so far.
    activations = [network.prepare_domain(name) for network in planned]
    now = change_now()
    # Past nn.Module.__setattr__, which costs a microsecond for each layer.
    for (attributes, state_name, _, _), state in zip(layers, new, strict=True):
        if attributes[state_name] is not state or attributes.get("_mixed") is not None:
            attributes[state_name], attributes["_mixed"], attributes["_changed"] = state, None, now
        elif now.by >= 0:
            attributes["_changed"] = now.again(attributes.get("_changed", NEVER))
    for activate in activations:
        activate()


def _set_mixed(layers: list[_Layer], planned: list[PlannedModel], numbers: Tensor) -> None:
    numbered = [states for _, _, states, _ in layers] + [dict.fromkeys(domain_names(network)) for network in planned]
    domains = _numbered(numbered)
    batch = MixedBatch(mixed_numbers(numbers, domains))
    names = [domains[number] for number in batch.numbers]
    activations = [network.prepare_domain(numbers, domains) for network in planned]
    now = change_now()
    for attributes, _, states, _ in layers:
        attributes["_mixed"], attributes["_changed"] = MixedStates(batch, [states[name] for name in names]), now
    for activate in activations:
        activate()


def _known(tables: list[dict[Any, Any]]) -> list[str]:
    return [domain for domain in tables[0] if all(domain in table for table in tables)]


def _numbered(tables: list[dict[Any, Any]]) -> list[str]:
    """The domains that all tables know, if all have them in one order."""
    known = _known(tables) if tables else []
    for table in tables:
        order = [domain for domain in table if domain in known]
        if order != known:
            raise ValueError(
                "domain_names(): expected the layers of `model` to have their domains in one order, which gives them "
                f"their numbers, got {known} and {order}. Hint: attach_ one table to the whole model, or make its "
                "layers with the domains in one order."
            )
    return known


def domain_names(model: nn.Module) -> list[str]:
    """The domains that every layer of a model knows, in the order of their numbers.

    :func:`bap_kernels.set_domain` takes these numbers for mixed batches. The order is the one in which
    :func:`bap_kernels.nn.switch_` was given the names, then that of :func:`bap_kernels.nn.add_domain_`; in a model
    without such layers it is the order of the table that was attached. Copies, pickles, plans and tables keep it. A
    state dict has no order: it is loaded by name, into the numbers that the model has.

    Args:
        model: any model, also wrapped or planned.

    Raises:
        ValueError: if layers have the same domains in different orders.

    Examples:
        >>> from torch import nn
        >>> import bap_kernels as bk
        >>> bk.domain_names(bk.nn.DomainBatchNorm2d(4, ["cars", "birds"]))
        ['cars', 'birds']
    """
    check_module("domain_names", model)
    layers = _layers(model)
    planned = [dict.fromkeys(domain_names(network.model)) for network in layers.planned_networks(model)]
    return _numbered([*(states for _, _, states, _ in layers.with_states()), *planned])
