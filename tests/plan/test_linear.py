"""Classifiers of plans, whose weights all threads read."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import bap_kernels as bk
from bap_kernels._load import _C
from bap_kernels.flow.ops import Call
from bap_kernels.plan.linear import linear_of


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def exact(x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
    bias = None if layer.bias is None else layer.bias.double()
    return F.linear(x.double(), layer.weight.double(), bias).detach()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("samples", [0, 1, 2, 4, 5, 17])
@pytest.mark.parametrize("shape", [(700, 333), (3, 5), (70_000, 3), (5, 40_000), (1024, 1024)])
def test_equals_the_layer(samples: int, shape: tuple[int, int], bias: bool, threads: int) -> None:
    layer = nn.Linear(*shape, bias=bias)
    x = torch.randn(samples, shape[0])
    with torch.no_grad():
        result = _C.linear(x, layer.weight, layer.bias)
    expected = exact(x, layer)
    assert result.shape == expected.shape
    assert result.dtype == torch.float32
    if samples:
        assert (result - expected).abs().max() <= 1e-6 * F.linear(x.abs(), layer.weight.abs()).max()


def test_every_number_of_threads_gives_the_same() -> None:
    layer, x = nn.Linear(1024, 1000), torch.randn(3, 1024)
    before = torch.get_num_threads()
    results = []
    with torch.no_grad():
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            results.append(_C.linear(x, layer.weight, layer.bias))
    torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_in_inference_mode() -> None:
    layer = nn.Linear(1024, 1000)
    with torch.inference_mode():
        x = torch.randn(1, 1024)
        result = _C.linear(x, layer.weight, layer.bias)
        assert result.is_inference()
        made_there = _C.linear(x, layer.weight * 1, layer.bias * 1)
    assert (result - exact(x, layer)).abs().max() <= 1e-5
    assert torch.equal(result, made_there)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.double(),
        lambda x: x.bfloat16(),
        lambda x: x.expand(2, 3, 1024),
        lambda x: x[0],
        lambda x: x.t().contiguous().t(),
        lambda x: x.to("meta"),
    ],
)
def test_what_is_no_plain_matrix_is_pytorchs(change) -> None:
    x = change(torch.randn(3, 1024))
    layer = nn.Linear(1024, 1000).to(x.device, x.dtype)
    with torch.no_grad():
        result, expected = _C.linear(x, layer.weight, layer.bias), layer(x)
    assert result.shape == expected.shape
    assert result.device == expected.device
    if not x.is_meta:
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


def test_gradients_flow_where_they_are_asked_for() -> None:
    layer, x = nn.Linear(1024, 1000), torch.randn(1, 1024, requires_grad=True)
    _C.linear(x, layer.weight, layer.bias).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0, keepdim=True), rtol=1e-4, atol=1e-4)


def test_a_wrong_width_is_pytorchs_error() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        _C.linear(torch.randn(1, 5), torch.randn(300_000, 7), None)


def test_autocast_is_pytorchs() -> None:
    layer, x = nn.Linear(1024, 1000), torch.randn(1, 1024)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert _C.linear(x, layer.weight, layer.bias).dtype == torch.bfloat16


def test_modes_see_the_call() -> None:
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    layer, x = nn.Linear(1024, 1000), torch.randn(1, 1024)
    with torch.no_grad(), Mode():
        _C.linear(x, layer.weight, layer.bias)
    assert any("addmm" in name or "linear" in name for name in seen)


def test_which_calls_are_classifiers() -> None:
    hooked, own = nn.Linear(4, 4), nn.Linear(4, 4)
    hooked.register_forward_hook(lambda *_: None)
    own.forward = lambda x: x  # type: ignore[method-assign]

    class Other(nn.Linear):
        pass

    assert linear_of(Call(nn.Linear(4, 4))) is not None
    for layer in (hooked, own, Other(4, 4), nn.Identity(), F.linear):
        assert linear_of(Call(layer)) is None
    assert linear_of(nn.ReLU()) is None


@pytest.mark.parametrize("classes", [1000, 10])
def test_a_plan_reads_its_classifier_by_rows(classes: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 512, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes)).eval()
    bk.swap_(model)
    x = torch.randn(2, 3, 5, 5)
    plan = bk.plan(model, x)
    assert "Linear" in repr(plan)
    assert type(plan._program.steps[-1].call).__name__ == "_Linear"
    with torch.no_grad():
        torch.testing.assert_close(plan(x), model(x), rtol=1e-4, atol=1e-5)
        model[3].weight.mul_(2)
        torch.testing.assert_close(plan(x), model(x), rtol=1e-4, atol=1e-5)
        model[3].weight = nn.Parameter(torch.randn(classes, 512))
        torch.testing.assert_close(plan(x), model(x), rtol=1e-4, atol=1e-4)
        model[3].register_forward_hook(lambda module, args, result: result + 1)
        torch.testing.assert_close(plan(x), model(x), rtol=1e-4, atol=1e-4)
