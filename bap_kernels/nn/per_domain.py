"""What layers with one set of parameters per domain have in common."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bap_kernels._arguments import check_module
from bap_kernels.layer_kinds import DomainLayer
from bap_kernels.nn.in_backward import check_domain, in_backward
from bap_kernels.nn.leaf import Proxy, as_one_step
from bap_kernels.nn.mixed import MixedStates

__all__ = ["PerDomain", "checked_names", "domain_layers", "domain_parameters"]

# Names that a torch.nn.ModuleDict would refuse, as it has attributes of that name.
_RESERVED = frozenset(dir(nn.ModuleDict()))
# In the dictionary of a domain's module: the name of the domain.
_DOMAIN = "_domain_name"


def _unusable_reason(name: object) -> str | None:
    if not isinstance(name, str):
        return "a name is text"
    if not name or "." in name:
        return "a name is part of the keys of the state: it is not empty and has no dot. Hint: use '-' or '_'"
    if name in _RESERVED:
        return "torch.nn.ModuleDict has an attribute of that name. Hint: choose another one"
    return None


def checked_names(where: str, names: Iterable[str]) -> list[str]:
    """The names of a layer's domains as a list: at least one, text, not empty, without dots, no repeats.

    Raises:
        ValueError: if one cannot be used.
    """
    if isinstance(names, str):
        raise ValueError(f"{where}(): expected `domains` to be several names, got {names!r}. Hint: pass [{names!r}].")
    listed: list[str] = []
    for name in names:
        reason = "it was given twice" if name in listed else _unusable_reason(name)
        if reason is not None:
            raise ValueError(f"{where}(): expected `domains` to be usable names, got {name!r}: {reason}.")
        listed.append(name)
    if not listed:
        raise ValueError(f"{where}(): expected `domains` to be at least one name, got none.")
    return listed


def _own(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


class PerDomain(DomainLayer):
    """Base of the layers that hold one module per domain, in :attr:`domains`, and use that of the active domain.

    A subclass computes the result of one domain in :meth:`_forward_in`, and that of a mixed batch in
    :meth:`_forward_mixed`. The state of the dense layer that it replaces loads too: every domain for which the file has
    no values takes those under the dense layer's keys.

    The active module is kept outside the module tree, which names it once, under its domain. Held as an object and not
    looked up by name, it lets torch.compile serve all domains with one graph.

    Attributes:
        domains: a :class:`torch.nn.ModuleDict`, {domain: module}.
    """

    domains: nn.ModuleDict
    # In the instance's dictionary, past nn.Module.__setattr__.
    _active: nn.Module | None
    _state_name = "_active"

    def _hold(self, modules: Mapping[str, nn.Module]) -> None:
        self.domains = nn.ModuleDict(dict(modules))
        for name, module in modules.items():
            module.__dict__[_DOMAIN] = name
        self.__dict__["_active"] = None

    def _states(self) -> Mapping[str, Any]:
        return self.domains._modules

    @property
    def active(self) -> nn.Module | None:
        """The module of the active domain, one of :attr:`domains`; None before a domain was chosen."""
        return None if self._active is None else self._current()

    def _current(self) -> nn.Module:
        """The active module, or the one that has taken its place in :attr:`domains`.

        Raises:
            RuntimeError: if no domain is active.
        """
        active = self._active
        if active is None:
            raise self._no_domain()
        # A compiled graph would be tied to one domain by its name.
        if not torch.compiler.is_compiling():
            domains = self._modules["domains"]
            assert domains is not None
            now = domains._modules.get(active.__dict__.get(_DOMAIN, ""), active)
            if now is not active and now is not None:
                # Replaced since set_domain, as torch.nn.SyncBatchNorm.convert_sync_batchnorm does.
                now.__dict__[_DOMAIN] = active.__dict__[_DOMAIN]
                self.__dict__["_active"] = active = now
        return active

    @property
    def domain(self) -> str | None:
        """The active domain; None before one was chosen."""
        active = self.active
        for name, module in self.domains.items():
            if module is active:
                return name
        return None

    def forward(self, input: Tensor) -> Tensor:
        """Applies the active domain's module; in a mixed batch, to each sample its own domain's."""
        if isinstance(input, Proxy):
            return as_one_step(self, input)
        if in_backward():
            check_domain(self)
        if self._mixed is not None:
            return self._forward_mixed(input, self._mixed)
        return self._forward_in(input)

    def _forward_in(self, input: Tensor) -> Tensor:
        return self._current()(input)

    def _forward_mixed(self, input: Tensor, mixed: MixedStates) -> Tensor:
        return mixed.apply(self, input, lambda samples, module: module(samples))

    def _add(self, name: str, module: nn.Module) -> None:
        checked_names(f"{type(self).__name__}.add_domain", [*self.domains, name])
        module.__dict__[_DOMAIN] = name
        self.domains[name] = module.train(self.training)

    def _module_of(self, name: str | None) -> nn.Module:
        """The module of a domain; None stands for the active one."""
        if name is not None:
            if name not in self.domains:
                raise ValueError(
                    f"{type(self).__name__}: expected `domain` to be one of {list(self.domains)}, got {name!r}."
                )
            return self.domains[name]
        return self._current()

    def _no_domain(self) -> RuntimeError:
        return RuntimeError(
            f"{type(self).__name__}(): expected a domain to be active, got none. "
            f"Hint: call set_domain(model, name) with one of {list(self.domains)}."
        )

    def _spread_dense_keys(self, state: dict[str, Any], prefix: str, assign: bool) -> None:
        """Gives the values under a dense layer's keys to every domain that has none in ``state``.

        Each domain gets tensors of its own: with ``assign`` they become its parameters.
        """
        place = f"{prefix}domains."
        known = {key for module in self.domains.values() for key in module.state_dict()}
        # Batch norms with fixed statistics accept it, and do not have it.
        known |= {"num_batches_tracked"} if "running_mean" in known else set()
        dense = {key: state.pop(prefix + key) for key in known if prefix + key in state}
        if not dense:
            return
        given = {key[len(place) :].split(".", 1)[0] for key in state if key.startswith(place)}
        for name, module in self.domains.items():
            if name not in given:
                for key, value in self._dense_values(module, dense).items():
                    state[f"{place}{name}.{key}"] = _own(value) if assign else value

    def _dense_values(self, module: nn.Module, dense: dict[str, Any]) -> dict[str, Any]:
        """What a domain's module takes from the state of a dense layer."""
        return dense

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, metadata: Any, *args: Any) -> None:
        self._spread_dense_keys(state_dict, prefix, bool(metadata.get("assign_to_params_buffers", False)))
        super()._load_from_state_dict(state_dict, prefix, metadata, *args)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A copy that torch.compile or an export made may lack it.
        self.__dict__.setdefault("_active", None)


def domain_layers(model: nn.Module) -> Iterator[tuple[str, PerDomain]]:
    """The layers of a model that hold one module per domain, as (name, layer).

    Examples:
        >>> from torch import nn
        >>> import bap_kernels as bk
        >>> model = nn.Sequential(nn.ReLU(), bk.nn.DomainBatchNorm2d(4, ["birds", "cars"]))
        >>> [name for name, layer in bk.nn.domain_layers(model)]
        ['1']
    """
    check_module("domain_layers", model)
    return ((name, module) for name, module in model.named_modules() if isinstance(module, PerDomain))


def domain_parameters(model: nn.Module, domain: str | None = None) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that belong to one domain, or to any, as (name, parameter); all others are shared.

    Args:
        model: any module.
        domain: the domain; None gives the parameters of all of them.

    Raises:
        ValueError: if no layer has that domain.

    Examples:
        >>> from torch import nn
        >>> import bap_kernels as bk
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), bk.nn.DomainBatchNorm2d(4, ["birds", "cars"]))
        >>> [name for name, parameter in bk.nn.domain_parameters(model, "cars")]
        ['1.domains.cars.weight', '1.domains.cars.bias']
    """
    check_module("domain_parameters", model)
    known: dict[str, None] = {}
    parameters = []
    for path, layer in domain_layers(model):
        for name, module in layer.domains.items():
            known[name] = None
            if domain is None or name == domain:
                prefix = f"{path}.domains.{name}" if path else f"domains.{name}"
                parameters += list(module.named_parameters(prefix))
    if domain is not None and domain not in known:
        raise ValueError(f"domain_parameters(): expected `domain` to be one of {list(known)}, got {domain!r}.")
    return iter(parameters)
