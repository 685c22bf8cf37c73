"""Calls as torch.fx writes them."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bap_kernels.flow.ops import Call

__all__ = ["WriteCall", "as_fx_call", "is_random"]

_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
# Methods of two tensors, or a tensor and a number, as the operators that call them.
_METHODS: dict[str, Any] = {
    **{name: getattr(operator, name) for name in ("add", "sub", "mul", "matmul")},
    **{f"{name}_": getattr(operator, f"i{name}") for name in ("add", "sub", "mul")},
    **{"div": operator.truediv, "true_divide": operator.truediv, "div_": operator.itruediv},
    **{f"__{name}__": getattr(operator, name) for name in _OPERATORS},
    **{f"__i{name}__": getattr(operator, f"i{name}") for name in _OPERATORS},
}
_SWAPPED: dict[str, Any] = {f"__r{name}__": getattr(operator, name) for name in _OPERATORS}
_SWAPPED["__rdiv__"] = operator.truediv


class WriteCall:
    """A function that writes to one of its arguments, as a function that returns what it wrote.

    Args:
        target: the function, or the name of a method.
        argument: the position or the keyword of the argument.
    """

    def __init__(self, target: Callable[..., Any] | str, argument: int | str) -> None:
        self.target, self.argument = target, argument

    @property
    def __name__(self) -> str:
        return self.target if isinstance(self.target, str) else getattr(self.target, "__name__", "write")

    def with_argument(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], function: Callable[[Any], Any]
    ) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """(what ``function`` makes of the argument, the arguments with it in the argument's place)."""
        if isinstance(self.argument, str):
            new = function(kwargs[self.argument])
            return new, args, {**kwargs, self.argument: new}
        new = function(args[self.argument])
        return new, (*args[: self.argument], new, *args[self.argument + 1 :]), kwargs

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the argument holds afterwards; the argument stays as it was."""
        changed, args, kwargs = self.with_argument(args, kwargs, torch.clone)
        Call(self.target)(*args, **kwargs)
        return changed

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WriteCall) and (self.target, self.argument) == (other.target, other.argument)

    def __hash__(self) -> int:
        return hash((self.target, self.argument))


def as_fx_call(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, Any, tuple[Any, ...]]:
    """A call as torch.fx writes it: (kind of node, target, arguments)."""
    if getattr(Tensor, name, None) is not func:
        return "call_function", func, args
    if name in ("__getitem__", "__setitem__"):
        return "call_function", getattr(operator, name.strip("_")), args
    if len(args) == 2 and not kwargs:
        if name in _METHODS:
            return "call_function", _METHODS[name], args
        if name in _SWAPPED:
            return "call_function", _SWAPPED[name], args[::-1]
    return "call_method", name, args


def is_random(target: Any) -> bool:
    """Whether a function, or the method of that name, returns something else each time it is called."""
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    return any(part in name for part in ("rand", "normal", "bernoulli", "multinomial", "dropout", "empty"))
