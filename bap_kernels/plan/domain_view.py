"""A model as one domain has it, sharing its parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from bap_kernels.channels import ChannelLists
from bap_kernels.nn.conv import GatheredConv2d
from bap_kernels.nn.module_copy import copy_modules, has_foreign_forward
from bap_kernels.nn.per_domain import PerDomain
from bap_kernels.nn.switched import SwitchedConv2d

__all__ = ["InDomain", "domain_set", "frozen", "in_domain", "lists_of"]

_ABSENT = object()


def lists_of(layer: GatheredConv2d, domain: str | None) -> ChannelLists:
    """The lists that :func:`bap_kernels.set_domain` would activate: of the domain, or those the layer was made with."""
    if not layer.lists:
        return layer.channels
    return ChannelLists() if domain is None else layer.lists[domain]


def _depends(module: nn.Module) -> bool:
    return any(isinstance(one, (GatheredConv2d, PerDomain)) for one in module.modules())


@contextlib.contextmanager
def domain_set(module: nn.Module, domain: str | None) -> Iterator[None]:
    """A module's layers in a domain, and afterwards as they were."""
    now: list[tuple[dict[str, Any], str, Any]] = []
    for one in module.modules():
        if isinstance(one, GatheredConv2d):
            now += [(one.__dict__, "channels", lists_of(one, domain)), (one.__dict__, "_mixed", None)]
        elif isinstance(one, PerDomain):
            active = None if domain is None else one.domains[domain]
            now += [(one.__dict__, "_active", active), (one.__dict__, "_mixed", None)]
    before = [(held, name, held[name]) if name in held else (held, name, _ABSENT) for held, name, _ in now]
    try:
        for held, name, value in now:
            held[name] = value
        yield
    finally:
        for held, name, value in before:
            if value is _ABSENT:
                held.pop(name, None)
            else:
                held[name] = value


class InDomain(nn.Module):
    """A module of the user's own, called in a domain: one whose instance has a forward that a copy cannot have.

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
    return InDomain(module, domain) if has_foreign_forward(module) and _depends(module) else None


def frozen(module: nn.Module, domain: str | None) -> nn.Module:
    """The module with the domain's lists for good, sharing its parameters; itself where it has no lists inside."""

    def kept(one: nn.Module) -> bool:
        return isinstance(one, InDomain) or not any(isinstance(inner, GatheredConv2d) for inner in one.modules())

    def replaced(one: nn.Module, copier: Any) -> nn.Module | None:
        other = _in_domain_if_foreign(one, domain)
        if other is None and isinstance(one, GatheredConv2d):
            made = copier.fresh(one)
            made.channels, made.lists = lists_of(one, domain), {}
            made.__dict__.pop("_mixed", None)
            assert isinstance(made, nn.Module)
            return made
        return other

    return copy_modules(module, kept, replaced)


def in_domain(module: nn.Module, domain: str | None) -> nn.Module:
    """The module with what it holds for one domain in the place of layers that hold one module per domain.

    Switched convolutions become gathered ones with the channels that are on. Parameters are shared; a module without
    such layers is given back itself.
    """

    def kept(one: nn.Module) -> bool:
        return not any(isinstance(inner, PerDomain) or has_foreign_forward(inner) for inner in one.modules())

    def replaced(one: nn.Module, copier: Any) -> nn.Module | None:
        other = _in_domain_if_foreign(one, domain)
        if other is not None or not isinstance(one, PerDomain):
            return other
        if domain is not None and not isinstance(one, SwitchedConv2d):
            return one.domains[domain]
        if domain is not None and isinstance(one, SwitchedConv2d) and one.groups == 1:
            gathered = one.to_gathered()
            gathered.channels, gathered.lists = one.channels(domain), {}
            return gathered
        made: nn.Module = copier.fresh(one)
        assert isinstance(made, PerDomain)
        made.__dict__["_active"] = None if domain is None else made.domains[domain]
        made.__dict__["_mixed"] = None
        return made

    return copy_modules(module, kept, replaced)
