"""Checks of arguments that many functions take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

__all__ = ["check_module"]


def check_module(function: str, model: Any, argument: str = "model") -> None:
    """Refuses what is no network, such as a state_dict, a path, or the arguments in another order.

    Raises:
        TypeError: if ``model`` is no :class:`torch.nn.Module`.
    """
    if not isinstance(model, nn.Module):
        hint = " Hint: load a state dict into its network first." if isinstance(model, Mapping) else ""
        raise TypeError(
            f"{function}(): expected `{argument}` to be a torch.nn.Module, got {type(model).__name__}.{hint}"
        )
