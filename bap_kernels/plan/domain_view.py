"""A model as one domain has it, sharing its parameters."""

from __future__ import annotations

import copy

from torch import nn

from bap_kernels.channels import ChannelLists
from bap_kernels.nn.conv import GatheredConv2d
from bap_kernels.nn.per_domain import PerDomain
from bap_kernels.nn.switched import SwitchedConv2d

__all__ = ["frozen", "in_domain", "lists_of"]


def lists_of(layer: GatheredConv2d, domain: str | None) -> ChannelLists:
    """The lists that :func:`bap_kernels.set_domain` would activate: of the domain, or those the layer was made with."""
    if not layer.lists:
        return layer.channels
    return ChannelLists() if domain is None else layer.lists[domain]


def frozen(module: nn.Module, domain: str | None) -> nn.Module:
    """The module with the domain's lists for good, sharing its parameters; itself where it has no lists inside."""
    if not any(isinstance(one, GatheredConv2d) for one in module.modules()):
        return module
    made = copy.copy(module)
    for name in ("_parameters", "_buffers", "_modules"):
        made.__dict__[name] = module.__dict__[name].copy()
    if isinstance(made, GatheredConv2d):
        made.channels, made.lists = lists_of(made, domain), {}
    for name, child in module._modules.items():
        if child is not None:
            made._modules[name] = frozen(child, domain)
    return made


def in_domain(module: nn.Module, domain: str | None) -> nn.Module:
    """The module with what it holds for one domain in the place of layers that hold one module per domain.

    Switched convolutions become gathered ones with the channels that are on. Parameters are shared; a module without
    such layers is given back itself.
    """
    if not any(isinstance(one, PerDomain) for one in module.modules()):
        return module
    if isinstance(module, PerDomain) and domain is not None:
        if not isinstance(module, SwitchedConv2d):
            return module.domains[domain]
        if module.groups == 1:
            gathered = module.to_gathered()
            gathered.channels, gathered.lists = module.channels(domain), {}
            return gathered
    made = copy.copy(module)
    for name in ("_parameters", "_buffers", "_modules"):
        made.__dict__[name] = module.__dict__[name].copy()
    if isinstance(made, PerDomain):
        made.__dict__["_active"] = None if domain is None else made.domains[domain]
        made.__dict__["_mixed"] = None
        return made
    for name, child in module._modules.items():
        if child is not None:
            made._modules[name] = in_domain(child, domain)
    return made
