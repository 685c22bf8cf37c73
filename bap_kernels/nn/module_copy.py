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
    """Copies all that can be reached from a module's attributes.

    Args:
        kept: whether a module is shared and not copied.
        replaced: gives the replacement of a module, or None to copy it.
    """

    def __init__(
        self, kept: Callable[[nn.Module], bool], replaced: Callable[[nn.Module, _Copier], nn.Module | None]
    ) -> None:
        self.kept, self.replaced = kept, replaced
        # By identity; the originals are held, so that no other object gets their identity.
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
            copied = functools.partial(parts[0], *parts[1], **parts[2])
            copied.__dict__.update(value.__dict__)
            return self._note(value, copied)
        return self._object(value)

    def _changed(self, values: list[Any]) -> list[Any] | None:
        """Copies of all; None if nothing in them had to be copied, apart from containers themselves."""
        copied = [self(item) for item in values]
        return None if all(new is old for new, old in zip(copied, values, strict=True)) else copied

    def _container(self, value: Any) -> Any:
        copied = self._note(value, value.copy())
        copied.clear()
        if isinstance(value, dict):
            copied.update({key: self(item) for key, item in value.items()})
        elif isinstance(value, set):
            copied.update(self(item) for item in value)
        else:
            copied.extend(self(item) for item in value)
        return copied

    def _tuple(self, value: tuple[Any, ...]) -> Any:
        copied = self._changed(list(value))
        if copied is None:
            return value
        kind: Any = type(value)
        if kind is tuple:
            return self._note(value, tuple(copied))
        return self._note(value, kind._make(copied)) if hasattr(kind, "_make") else value

    def _object(self, value: Any) -> Any:
        # A helper object may hold modules, or be where a forward keeps what it computed.
        kind, held = type(value), getattr(value, "__dict__", None)
        if type(held) is not dict or kind.__module__.partition(".")[0] in ("torch", "builtins", "numpy"):
            return value
        try:
            copied = object.__new__(kind)
        except TypeError:
            return value
        self._note(value, copied)
        copied.__dict__.update({name: self(item) for name, item in held.items()})
        return copied

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
        """A copy of a module, even if it has a replacement."""
        copied: nn.Module = self._note(module, object.__new__(type(module)))
        for name, value in module.__dict__.items():
            copied.__dict__[name] = value if name in _HOOKS else self(value)
        # Compiled for the original.
        copied.__dict__.pop("_compiled_call_impl", None)
        return copied


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
        replaced: ``replaced(module, copier)`` gives the replacement of a module, for instance a changed
            ``copier.fresh(module)``; None copies the module.
    """
    return _Copier(kept, replaced).module(module)


def has_foreign_forward(module: nn.Module) -> bool:
    """Whether the instance has a forward of its own that a copy of the module would share with the original.

    Such a function may hold the original module; methods and functools.partial objects that do can be copied.
    """
    own = module.__dict__.get("forward")
    if own is None:
        return False
    copied = _Copier(lambda item: False, lambda item, copier: None)(own)
    return copied is own
