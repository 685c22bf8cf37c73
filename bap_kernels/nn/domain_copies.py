"""Copies of a layer, one for each domain."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from bap_kernels.nn.replaceable import has_own_forward

__all__ = ["Memos", "copies_of", "is_hook_table", "refuse_own_forward"]

# What copy.deepcopy has seen, for each domain.
Memos = Mapping[str, dict[int, Any]]


def is_hook_table(key: str, value: Any) -> bool:
    """Whether an attribute of a module is one of its tables of hooks."""
    return key.startswith(("_forward", "_backward")) and isinstance(value, dict)


def copies_of(module: nn.Module, names: Iterable[str], memos: Memos | None) -> dict[str, nn.Module]:
    """A copy of a module for every domain; what one memo has seen, such as a shared parameter, is copied once."""
    # Hooks are not copied: whoever registered them sees every domain, and can still remove them.
    hooks = [value for part in module.modules() for key, value in part.__dict__.items() if is_hook_table(key, value)]
    copies = {}
    for name in names:
        memo = {} if memos is None else memos[name]
        memo.update({id(table): table for table in hooks})
        copies[name] = copy.deepcopy(module, memo)
    return copies


def refuse_own_forward(where: str, argument: str, layer: nn.Module) -> None:
    """Raises NotImplementedError for a layer whose instance has a ``forward`` of its own."""
    if has_own_forward(layer):
        raise NotImplementedError(
            f"{where}(): expected `{argument}` to have the forward of its class, got a {type(layer).__name__} on which "
            "another one was set: it would go on calling the layer it was made for. Hint: remove it first."
        )
