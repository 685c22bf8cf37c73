"""Numbers that a forward computes from the sizes of tensors, while it is being recorded.

Code can compute with them and pass them to PyTorch; each knows the step that computes it. Where the code needs the
value (a branch, a loop, an index into a list) the steps would be right for the example's sizes only: `Unrecordable` is
raised.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

__all__ = ["Number", "Unrecordable", "make_number"]


class Unrecordable(BaseException):
    """Raised in a model's code where its steps depend on numbers; its ``except Exception`` does not catch it.

    Attributes:
        module: the name of the module that has to become one step; None: the innermost.
    """

    def __init__(self, reason: str, module: str | None = None) -> None:
        super().__init__(reason)
        self.module = module


class Number:
    """A recorded number.

    Attributes:
        value: the number on the example.
        step: gives the step that computes it.
        recorder: adds steps, and says whether the recording goes on.
    """

    value: Any
    step: Callable[[], fx.Node]
    recorder: Any

    def _read(self, what: str) -> Any:
        """The number itself."""
        if self.recorder.recording:
            raise self.recorder.unrecordable(f"{what} a number that depends on the size of the input")
        return self.value

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        # `isinstance(size, int)` holds in the model's code.
        return type(self.value)

    @property
    def node(self) -> Any:
        """What torch.SymInt reads in operations that are not recorded."""
        raise self.recorder.unrecordable("it computes in an unknown way with the size of the input")

    def __hash__(self) -> int:
        return hash(self._read("it looks up"))

    def __bool__(self) -> bool:
        return bool(self._read("it branches on"))

    def __index__(self) -> int:
        return operator.index(self._read("it counts to"))

    def __int__(self) -> int:
        return int(self._read("it reads"))

    def __float__(self) -> float:
        return float(self._read("it reads"))

    def __complex__(self) -> complex:
        return complex(self._read("it reads"))

    def __repr__(self) -> str:
        # Messages are made even where they are not shown; a number in them would be the example's.
        return "<size>" if self.recorder.recording else repr(self.value)

    def __str__(self) -> str:
        return repr(self)

    def __format__(self, specification: str) -> str:
        return repr(self) if self.recorder.recording else format(self.value, specification)

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: Any) -> Any:
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        return type(self.value), (self.value,)


class _Int(Number, torch.SymInt):  # type: ignore[override]
    def __init__(self) -> None:
        pass


class _Float(Number, torch.SymFloat):  # type: ignore[override]
    def __init__(self) -> None:
        pass


class _Bool(Number, torch.SymBool):  # type: ignore[override]
    def __init__(self) -> None:
        pass


_KINDS: dict[type, type] = {int: _Int, float: _Float, bool: _Bool}


def make_number(recorder: Any, value: Any, step: Callable[[], fx.Node]) -> Any:
    """A number of the example with the step that computes it; anything else as it is."""
    kind = _KINDS.get(type(value))
    if kind is None:
        return value
    number: Any = kind()
    number.value, number.recorder, number.step = value, recorder, step
    return number


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Number) else value


def _computed(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    if not all(type(argument) in (int, float, bool) or isinstance(argument, Number) for argument in arguments):
        return NotImplemented
    recorder = next(argument.recorder for argument in arguments if isinstance(argument, Number))
    value = function(*map(_plain, arguments))
    if not recorder.recording:
        return value
    node = recorder.add_function(function, arguments)
    return make_number(recorder, value, lambda: node)


def _define(name: str, function: Callable[..., Any], swapped: bool = False) -> None:
    def method(self: Any, *others: Any) -> Any:
        return _computed(function, (*others, self) if swapped else (self, *others))

    method.__name__ = name
    for kind in (_Int, _Float, _Bool):
        setattr(kind, name, method)


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift"):
    _function = getattr(operator, f"{_name}_" if _name in ("and", "or") else _name)
    _define(f"__{_name}__", _function)
    _define(f"__r{_name}__", _function, swapped=True)
for _name in ("eq", "ne", "lt", "le", "gt", "ge", "neg", "pos", "abs", "invert"):
    _define(f"__{_name}__", getattr(operator, _name))
for _name, _function in (("floor", math.floor), ("ceil", math.ceil), ("trunc", math.trunc), ("round", round)):
    _define(f"__{_name}__", _function)
for _kind in (_Int, _Float, _Bool):
    # Defining __eq__ later does not drop it.
    _kind.__hash__ = Number.__hash__  # type: ignore[method-assign]
