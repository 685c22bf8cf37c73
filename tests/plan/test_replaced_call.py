"""Calls of a model that a plan replaces stay visible to whoever asked to see them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import bap_kernels as bk
from bap_kernels.flow.ops import Call
from bap_kernels.plan.linear import linear_of
from bap_kernels.plan.pooling import pooling_of
from bap_kernels.plan.replaced_call import ReplacedCall

IMAGES, ROWS = (2, 8, 6, 6), (2, 512)
CALLS: dict[str, tuple[Callable[[], ReplacedCall | None], tuple[int, ...], str]] = {
    "max": (lambda: pooling_of(nn.MaxPool2d(2)), IMAGES, "max_pool2d"),
    "average": (lambda: pooling_of(nn.AvgPool2d(2)), IMAGES, "avg_pool2d"),
    "global": (lambda: pooling_of(nn.AdaptiveAvgPool2d(1)), IMAGES, "adaptive_avg_pool2d"),
    "linear": (lambda: linear_of(Call(nn.Linear(512, 1000))), ROWS, "linear"),
}
every_call = pytest.mark.parametrize("name", CALLS)


def make(name: str) -> tuple[ReplacedCall, Tensor, str]:
    call, shape, function = CALLS[name]
    made = call()
    assert made is not None
    return made, torch.randn(shape), function


def named(func: Any) -> str:
    return getattr(func, "__name__", str(func))


@every_call
def test_plain_tensors_are_ours(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call, x, _ = make(name)
    with torch.no_grad():
        expected = call.original(x)
        monkeypatch.setattr(call, "original", None)
        torch.testing.assert_close(call(x), expected, rtol=1e-5, atol=1e-5)


@every_call
def test_function_modes_see_the_call(name: str) -> None:
    call, x, function = make(name)
    seen = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(named(func))
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Mode():
        call(x)
    assert any(function in one for one in seen)


@every_call
def test_subclasses_see_the_call_and_stay_themselves(name: str) -> None:
    call, x, function = make(name)
    seen = []

    class Own(Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(named(func))
            return super().__torch_function__(func, types, args, kwargs or {})

    with torch.no_grad():
        result = call(x.as_subclass(Own))
    assert type(result) is Own
    assert any(function in one for one in seen)


@every_call
def test_the_backend_aten_is_pytorchs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call, x, _ = make(name)
    monkeypatch.setattr(call, "run", None)
    with torch.no_grad(), bk.use_backend("aten"):
        assert torch.equal(call(x), call.original(x))
