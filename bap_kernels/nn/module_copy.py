"""Copies of module trees that share parameters and buffers, and nothing that a forward may write to."""

from __future__ import annotations

import collections
import functools
import types
from collections.abc import Callable
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from bap_kernels.channels import ChannelLists

__all__ = ["copy_modules", "has_foreign_forward"]

# Tables of hooks stay shared, so that handles can still remove their hooks.
_HOOKS = frozenset(name for name in vars(nn.Module()) if name.endswith(("_hooks", "_with_kwargs", "_always_called")))
_CONTAINERS = (dict, list, set, collections.OrderedDict, collections.defaultdict, collections.deque)
_SHARED = (Tensor, ChannelLists, Enum, type, types.ModuleType, types.FunctionType, torch.jit.ScriptModule)


class _Copier:
    """Copies what a module's attributes lead to; ``kept`` and ``replaced`` decide about modules.

    Args:
        kept: modules that stay what they are.
        replaced: gives the module that takes a module's place, already a copy, or None.
    """

    def __init__(
        self, kept: Callable[[nn.Module], bool], replaced: Callable[[nn.Module, _Copier], nn.Module | None]
    ) -> None:
        self.kept, self.replaced = kept, replaced
        # By identity; the originals are held, so that identities stay theirs.
        self.done: dict[int, tuple[Any, Any]] = {}

    def _note(self, old: Any, new: Any) -> Any:
        self.done[id(old)] = old, new
        return new

    def __call__(self, value: Any) -> Any:
        kind = type(value)
        if kind in (int, float, bool, str, bytes, type(None)) or issubclass(kind, _SHARED):
            return value
        if id(value) in self.done:
            return self.done[id(value)][1]
        if issubclass(kind, nn.Module):
            return self.module(value)
        if kind in _CONTAINERS:
            return self._container(value)
        if issubclass(kind, tuple):
            return self._tuple(value)
        if kind is types.MethodType:
            owner = self(value.__self__)
            return value if owner is value.__self__ else types.MethodType(value.__func__, owner)
        if kind is functools.partial:
            parts = self._changed([value.func, value.args, value.keywords])
            if parts is None:
                return value
            made = functools.partial(parts[0], *parts[1], **parts[2])
            made.__dict__.update(value.__dict__)
            return self._note(value, made)
        return self._object(value)

    def _changed(self, values: list[Any]) -> list[Any] | None:
        """Copies of all; None if nothing in them had to be copied, apart from containers themselves."""
        made = [self(one) for one in values]
        return None if all(new is old for new, old in zip(made, values, strict=True)) else made

    def _container(self, value: Any) -> Any:
        made = self._note(value, value.copy())
        made.clear()
        if isinstance(value, dict):
            made.update({key: self(one) for key, one in value.items()})
        elif isinstance(value, set):
            made.update(self(one) for one in value)
        else:
            made.extend(self(one) for one in value)
        return made

    def _tuple(self, value: tuple[Any, ...]) -> Any:
        made = self._changed(list(value))
        if made is None:
            return value
        kind: Any = type(value)
        if kind is tuple:
            return self._note(value, tuple(made))
        return self._note(value, kind._make(made)) if hasattr(kind, "_make") else value

    def _object(self, value: Any) -> Any:
        # A helper object may hold modules, or be where a forward keeps what it computed.
        kind, held = type(value), getattr(value, "__dict__", None)
        if type(held) is not dict or kind.__module__.partition(".")[0] in ("torch", "builtins", "numpy"):
            return value
        try:
            made = object.__new__(kind)
        except TypeError:
            return value
        self._note(value, made)
        made.__dict__.update({name: self(one) for name, one in held.items()})
        return made

    def module(self, module: nn.Module) -> nn.Module:
        """The copy of a module, the same for every place in which it stands."""
        if id(module) in self.done:
            return self.done[id(module)][1]
        if self.kept(module):
            return module
        other = self.replaced(module, self)
        if other is not None:
            return self._note(module, other)
        return self.fresh(module)

    def fresh(self, module: nn.Module) -> nn.Module:
        """A copy of a module, whatever may take its place."""
        made: nn.Module = self._note(module, object.__new__(type(module)))
        for name, value in module.__dict__.items():
            made.__dict__[name] = value if name in _HOOKS else self(value)
        # Compiled for the original.
        made.__dict__.pop("_compiled_call_impl", None)
        return made


def copy_modules(
    module: nn.Module,
    kept: Callable[[nn.Module], bool] = lambda module: False,
    replaced: Callable[[nn.Module, _Copier], nn.Module | None] = lambda module, copier: None,
) -> nn.Module:
    """A copy of a module tree that shares tensors; lists, dictionaries and helper objects in attributes are copies.

    Methods that are bound to a module of the tree, as some libraries set them on instances, are bound to its copy.

    Args:
        module: the tree; modules that occur in several places still do.
        kept: modules for which it is true are not copied.
        replaced: ``replaced(module, copier)`` gives what takes a module's place, made with ``copier.fresh(module)``
            or anyhow; None copies it.
    """
    return _Copier(kept, replaced).module(module)


def has_foreign_forward(module: nn.Module) -> bool:
    """Whether the instance has a forward of its own that a copy of the module would share with the original.

    Such a function may hold the original module; a method or a functools.partial that does is seen through.
    """
    own = module.__dict__.get("forward")
    if own is None:
        return False
    copied = _Copier(lambda one: False, lambda one, copier: None)(own)
    return copied is own
