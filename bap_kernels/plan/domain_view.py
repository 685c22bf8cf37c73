"""A model as one domain has it, sharing its parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import nn

from bap_kernels.channels import ChannelLists
from bap_kernels.flow.graph import Channels
from bap_kernels.layer_kinds import DomainLayer
from bap_kernels.nn.conv import GatheredConv2d, MaskedConv2d
from bap_kernels.nn.module_copy import copy_modules, has_foreign_forward
from bap_kernels.nn.per_domain import PerDomain
from bap_kernels.nn.switched import SwitchedConv2d

__all__ = ["InDomain", "channels_of", "domain_set", "fixed_lists", "frozen", "in_domain", "lists_of"]

_ABSENT = object()


def lists_of(layer: GatheredConv2d, domain: str | None) -> ChannelLists:
    """The lists that :func:`bap_kernels.set_domain` would activate: of the domain, or those the layer was made with."""
    if not layer.lists:
        return layer.channels
    return ChannelLists() if domain is None else layer.lists[domain]


def channels_of(conv: nn.Conv2d, domain: str | None) -> tuple[str, Channels, Channels]:
    """The kind of a convolution, and the channels that it reads and writes; -1 where it writes zeros."""
    lists = lists_of(conv, domain) if isinstance(conv, GatheredConv2d) else ChannelLists()
    listed_in, listed_out = lists._host
    reads = np.arange(conv.in_channels) if listed_in is None else listed_in.astype(np.int64)
    writes = np.arange(conv.out_channels) if listed_out is None else listed_out.astype(np.int64)
    if isinstance(conv, MaskedConv2d):
        listed = writes
        writes = np.full(conv.out_channels, -1)
        writes[listed] = listed
    if conv.groups == 1:
        return "conv", reads, writes
    if conv.groups != conv.in_channels or conv.groups != conv.out_channels:
        return "grouped", reads, writes
    return "depthwise", np.arange(conv.in_channels) if isinstance(conv, MaskedConv2d) else writes, writes


def fixed_lists(layer: GatheredConv2d, domain: str | None, copier: Any) -> GatheredConv2d:
    """A copy of a layer, made by a copier of `copy_modules`, with the domain's lists as its only ones."""
    copied: GatheredConv2d = copier.fresh(layer)
    copied.channels, copied.lists = lists_of(layer, domain), {}
    copied.__dict__.pop("_mixed", None)
    return copied


@contextlib.contextmanager
def domain_set(module: nn.Module, domain: str | None) -> Iterator[None]:
    """A module's layers in a domain, and afterwards as they were."""
    layers = [layer for layer in module.modules() if isinstance(layer, DomainLayer)]
    before = [
        (layer.__dict__, name, layer.__dict__.get(name, _ABSENT))
        for layer in layers
        for name in (layer._state_name, "_mixed")
    ]
    try:
        for layer in layers:
            if isinstance(layer, GatheredConv2d):
                state: Any = lists_of(layer, domain)
            else:
                state = None if domain is None else layer._states()[domain]
            layer.__dict__.update({layer._state_name: state, "_mixed": None})
        yield
    finally:
        for attributes, name, value in before:
            if value is _ABSENT:
                attributes.pop(name, None)
            else:
                attributes[name] = value


class InDomain(nn.Module):
    """Calls a module in a domain, where its instance has a forward of its own that a copy cannot have.

    While it runs, the module's layers are set to the domain, for every thread that calls them.
    """

    def __init__(self, module: nn.Module, domain: str | None) -> None:
        super().__init__()
        self.module, self.domain = module, domain
        self.training = module.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls it."""
        with domain_set(self.module, self.domain):
            return self.module(*args, **kwargs)


def _in_domain_if_foreign(module: nn.Module, domain: str | None) -> nn.Module | None:
    depends = has_foreign_forward(module) and any(isinstance(inner, DomainLayer) for inner in module.modules())
    return InDomain(module, domain) if depends else None


def frozen(module: nn.Module, domain: str | None) -> nn.Module:
    """A copy of the module whose layers have only the domain's lists, sharing parameters; itself if it has none."""

    def kept(part: nn.Module) -> bool:
        return isinstance(part, InDomain) or not any(isinstance(inner, GatheredConv2d) for inner in part.modules())

    def replaced(part: nn.Module, copier: Any) -> nn.Module | None:
        other = _in_domain_if_foreign(part, domain)
        return fixed_lists(part, domain, copier) if other is None and isinstance(part, GatheredConv2d) else other

    return copy_modules(module, kept, replaced)


def in_domain(module: nn.Module, domain: str | None) -> nn.Module:
    """The module in which layers that hold one module per domain are replaced by the module of one domain.

    Switched convolutions become gathered ones with the channels that are on. Parameters are shared; a module without
    such layers is given back itself.
    """

    def kept(part: nn.Module) -> bool:
        return not any(isinstance(inner, PerDomain) or has_foreign_forward(inner) for inner in part.modules())

    def replaced(part: nn.Module, copier: Any) -> nn.Module | None:
        other = _in_domain_if_foreign(part, domain)
        if other is not None or not isinstance(part, PerDomain):
            return other
        if domain is not None and not isinstance(part, SwitchedConv2d):
            return part.domains[domain]
        if domain is not None and isinstance(part, SwitchedConv2d) and part.groups == 1:
            gathered = part.to_gathered()
            gathered.channels, gathered.lists = part.channels(domain), {}
            return gathered
        copied: PerDomain = copier.fresh(part)
        active = None if domain is None else copied.domains[domain]
        copied.__dict__.update({"_active": active, "_mixed": None})
        # Of a depthwise layer, which stays one with switches: those that read its result are gathered ones here.
        copied.__dict__.pop("consumers", None)
        return copied

    return copy_modules(module, kept, replaced)
