"""The kinds of layers and networks that depend on the domain, as base classes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from bap_kernels.channels import ChannelLists

if TYPE_CHECKING:
    from bap_kernels.nn.mixed import MixedStates

__all__ = ["NEVER", "Change", "DomainLayer", "GatheredLayer", "PlannedModel", "SwitchedLayer", "change_now"]

_graph_task = torch._C._current_graph_task_id


class Change(NamedTuple):
    """When a layer's domain last changed.

    Attributes:
        at: autograd nodes made before have smaller numbers.
        by: the node for which a backward computed the function that set the domain; -1 outside of a backward.
        thread: that of the change; every thread numbers its own nodes.
    """

    at: int = 0
    by: int = -1
    thread: int = 0

    def again(self, before: Change) -> Change:
        """This one, for a layer that has the domain already since ``before``."""
        return before if self.by < 0 else before._replace(by=self.by)


NEVER = Change()


def change_now() -> Change:
    """For a layer whose domain is set now."""
    if torch.compiler.is_compiling():
        return NEVER
    node = None if _graph_task() == -1 else torch._C._current_autograd_node()
    by = -1 if node is None else node._sequence_nr()
    return Change(torch._C._autograd._get_sequence_nr(), by, threading.get_ident())


def _refuse_script(module: nn.Module) -> None:
    """Called by torch.jit.script, for whatever it finds in a model.

    Raises:
        NotImplementedError: always; TorchScript knows no lists.
    """
    raise NotImplementedError(
        "torch.jit.script(): expected a model without layers that depend on the domain, "
        f"got a {type(module).__name__}. Hint: script bap_kernels.specialize(model, domain), a plain network; "
        "torch.jit.trace takes the model itself."
    )


class DomainLayer(nn.Module):
    """A layer that computes something else in each domain.

    What it uses in the active domain, its state there, is one attribute of the instance: lists, or a module.
    """

    # The attribute with the active domain's state.
    _state_name: ClassVar[str]
    # Whether it works without an active domain; its state is then `_without_domain`.
    _needs_domain: ClassVar[bool] = True
    _without_domain: ClassVar[Any] = None
    # While a mixed batch is set: the states of its domains.
    _mixed: MixedStates | None = None
    # When the state last changed.
    _changed: Change = NEVER

    @property
    def _state(self) -> Any:
        """The active domain's state."""
        return self.__dict__[self._state_name]

    def _states(self) -> Mapping[str, Any]:
        """The state of each domain."""
        raise NotImplementedError

    def _also_asks(self) -> Sequence[DomainLayer]:
        """Other layers whose state its forward looks at."""
        return ()

    def _use(self, state: Any) -> None:
        # Past nn.Module.__setattr__: a module among the states must not be registered twice.
        self.__dict__.update({self._state_name: state, "_mixed": None, "_changed": change_now()})

    def set_domain(self, name: str | None) -> None:
        """Activates one domain; :func:`bap_kernels.set_domain` does that for a whole model.

        Args:
            name: the domain; None makes a convolution keep all of its channels.

        Raises:
            ValueError: if the layer has no domain of that name, or ``name`` is None and it needs a domain.
        """
        states = self._states()
        if name is None and not self._needs_domain:
            self._use(self._without_domain)
        elif isinstance(name, str) and name in states:
            self._use(states[name])
        else:
            raise ValueError(f"set_domain(): expected `name` to be one of {list(states)}, got {name!r}.")

    def __prepare_scriptable__(self) -> None:
        _refuse_script(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # It may come from another process, whose nodes have other numbers.
        self.__dict__.pop("_changed", None)


class GatheredLayer(DomainLayer):
    """A convolution with fixed lists.

    Attributes:
        channels: the active lists.
        lists: {domain: lists}.
    """

    channels: ChannelLists
    lists: dict[str, ChannelLists]


class SwitchedLayer(DomainLayer):
    """A convolution whose lists follow from trained switches.

    Attributes:
        domains: {domain: its switches}.
        groups: of the convolution.
    """

    domains: nn.ModuleDict
    groups: int

    def channels(self, domain: str | None = None) -> ChannelLists:
        """The channels that a domain reads; None stands for the active domain."""
        raise NotImplementedError


class PlannedModel(nn.Module):
    """A network with a plan for each domain instead of layers that depend on it.

    Attributes:
        model: the network that was planned.
    """

    model: nn.Module

    def __prepare_scriptable__(self) -> None:
        _refuse_script(self)

    def prepare_domain(self, name: str | Tensor | None, domains: Sequence[str] | None = None) -> Callable[[], None]:
        """Makes the plans of a domain or of a mixed batch, and returns what activates them.

        Args:
            name: as for :func:`bap_kernels.set_domain`.
            domains: the names that the numbers of a mixed batch stand for; None: the model's domains.
        """
        raise NotImplementedError
