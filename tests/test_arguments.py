"""What every public function says of a first argument that is no network, and other arguments of a wrong type."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import bap_kernels as bk

X = torch.randn(1, 3, 8, 8)


def _takers() -> dict[str, Callable[..., Any]]:
    """Public functions and methods that take a network first."""
    found: dict[str, Callable[..., Any]] = {}
    for module in (bk, bk.nn):
        found |= {name: getattr(module, name) for name in module.__all__}
    found |= {f"ChannelTable.{name}": getattr(bk.ChannelTable, name) for name in ("random", "from_weights")}
    functions = (types.FunctionType, types.MethodType)
    return {
        name: function
        for name, function in found.items()
        if isinstance(function, functions)
        and next(iter(inspect.signature(function).parameters), "") in ("model", "module")
    }


TAKERS = _takers()


def test_the_functions_are_found() -> None:
    assert {"swap_", "plan", "set_domain", "switch_", "ChannelTable.random"} <= set(TAKERS)


@pytest.mark.parametrize("given", ["net", None, X, {"conv.weight": X}], ids=["str", "None", "tensor", "state_dict"])
@pytest.mark.parametrize("name", TAKERS)
def test_what_is_no_network_is_named(name: str, given: Any) -> None:
    function = TAKERS[name]
    first, *others = inspect.signature(function).parameters.values()
    needed = [p for p in others if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    with pytest.raises(TypeError) as raised:
        function(given, *[X for _ in needed])
    kind = type(given).__name__
    assert f"expected `{first.name}` to be a torch.nn.Module, got {kind}." in str(raised.value)
    assert ("Hint" in str(raised.value)) == isinstance(given, dict)


def _net() -> nn.Module:
    model = bk.swap_(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval())
    return bk.attach_(model, bk.ChannelTable.random(model, ["a"], 0.5, 0))


WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "density": (
        lambda: bk.ChannelTable.random(_net(), ["a"], "half"),  # type: ignore[arg-type]
        TypeError,
        r"expected `density` to be a number, got 'half'",
    ),
    "domains from a generator": (
        lambda: bk.ChannelTable.random(_net(), (name for name in "aa"), 0.5),  # type: ignore[arg-type]
        ValueError,
        r"each name once, got \['a', 'a'\]",
    ),
    "tolerance": (
        lambda: bk.plan(_net(), X, "a", tolerance="1e-3"),  # type: ignore[arg-type]
        TypeError,
        r"expected `tolerance` to be a number or None, got '1e-3'",
    ),
    "memory_format": (
        lambda: bk.plan(_net(), X, "a", memory_format="nhwc"),  # type: ignore[arg-type]
        ValueError,
        r"expected `memory_format` to be one of .*channels_last.*, got 'nhwc'",
    ),
    "example of a report": (
        lambda: bk.report(_net(), "x"),  # type: ignore[arg-type]
        ValueError,
        r"expected `example_input` to be what `model` takes, got 'x', on which it raised",
    ),
    "input of a layer": (lambda: _net()[2]([1, 2]), TypeError, r"expected `input` to be a tensor, got list"),
}


@pytest.mark.parametrize("name", WRONG)
def test_arguments_of_another_type_are_named(name: str) -> None:
    call, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        call()
