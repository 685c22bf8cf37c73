"""Poolings of plans, by our kernels and by PyTorch's."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import bap_kernels as bk
from bap_kernels._load import _C
from bap_kernels.flow.ops import Call
from bap_kernels.plan.pooling import pooling_of

LAYOUTS = [torch.contiguous_format, torch.channels_last]
needs_kernels = pytest.mark.skipif(_C.isa() == "none", reason="no native kernels")


@pytest.mark.parametrize(
    ("call", "known"),
    [
        (nn.MaxPool2d(2), True),
        (nn.MaxPool2d(3, 2, 1, 2, ceil_mode=True), True),
        (nn.MaxPool2d((3, 2), stride=(1, 2), padding=(1, 0)), True),
        (nn.MaxPool2d(2, return_indices=True), False),
        (nn.AvgPool2d(2), True),
        (nn.AvgPool2d(3, 2, 1), False),
        (nn.AvgPool2d(2, ceil_mode=True), False),
        (nn.AvgPool2d(2, divisor_override=3), False),
        (Call(nn.MaxPool2d(2)), True),
        (Call(F.max_pool2d, (2,)), True),
        (Call(F.max_pool2d, (3, 2), padding=1), True),
        (Call(torch.max_pool2d, ((2, 2), ())), True),
        (Call(F.max_pool2d, (2,), return_indices=True), False),
        (Call(F.avg_pool2d, (2, 2)), True),
        (Call(F.avg_pool2d, (2,), padding=1), False),
        (nn.AdaptiveAvgPool2d(1), True),
        (Call(nn.AdaptiveAvgPool2d((1, 1))), True),
        (Call(nn.AdaptiveAvgPool2d((1, 2))), False),
        (Call(nn.AdaptiveAvgPool2d((None, 1))), False),
        (Call(nn.AdaptiveMaxPool2d(1)), False),
        (Call(F.adaptive_avg_pool2d, (1,)), True),
        (Call(F.adaptive_avg_pool2d, output_size=[1, 1]), True),
        (Call(F.adaptive_avg_pool2d, (2,)), False),
        (Call(F.adaptive_max_pool2d, (1,)), False),
        (Call("mean", ((2, 3),)), False),
        (nn.ReLU(), False),
    ],
)
def test_which_calls_are_known(call: Any, known: bool) -> None:
    pooling = pooling_of(call)
    assert (pooling is not None) is known
    if pooling is not None:
        x = torch.randn(2, 3, 9, 8)
        torch.testing.assert_close(pooling(x), call(x))


def test_a_subclass_is_not_taken_for_its_base() -> None:
    class Doubled(nn.MaxPool2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    assert pooling_of(Doubled(2)) is None


def test_hooks_and_forwards_of_its_own_are_called() -> None:
    hooked, replaced = nn.MaxPool2d(2), nn.MaxPool2d(2)
    hooked.register_forward_hook(lambda module, args, result: result + 1)
    replaced.forward = lambda x: F.avg_pool2d(x, 2)  # type: ignore[method-assign]
    x = torch.randn(1, 8, 8, 8)
    for pool in (hooked, replaced):
        assert pooling_of(pool) is None
        assert pooling_of(Call(pool)) is None
        model = bk.swap_(nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), pool, nn.Conv2d(8, 4, 1)).eval())
        planned = bk.plan(model, x)
        with torch.no_grad():
            torch.testing.assert_close(planned(x), model(x))
    # A hook that comes later is seen, too.
    model = bk.swap_(nn.Sequential(nn.Conv2d(8, 8, 1), nn.MaxPool2d(2), nn.Conv2d(8, 4, 1)).eval())
    planned = bk.plan(model, x)
    model[1].register_forward_hook(lambda module, args, result: result + 1)
    with torch.no_grad():
        torch.testing.assert_close(planned(x), model(x))


# (kernel, stride, padding, dilation, ceil_mode)
WINDOWS = [
    ((2, 2), (2, 2), (0, 0), (1, 1), False),
    ((3, 3), (2, 2), (1, 1), (1, 1), False),
    ((3, 3), (2, 2), (0, 0), (1, 1), True),
    ((3, 3), (1, 1), (1, 1), (1, 1), False),
    ((2, 3), (1, 2), (1, 0), (1, 1), True),
    ((3, 2), (3, 1), (1, 1), (2, 3), False),
    ((1, 1), (2, 3), (0, 0), (1, 1), False),
    ((5, 7), (4, 5), (2, 3), (1, 1), True),
    ((2, 2), (5, 5), (1, 1), (3, 2), True),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("window", WINDOWS)
def test_max_equals_pytorchs(window: tuple[Any, ...], dtype: torch.dtype, layout: torch.memory_format) -> None:
    for shape in ((2, 5, 7, 9), (1, 33, 14, 12), (3, 16, 8, 40), (1, 1, 9, 70), (1, 70, 7, 7)):
        x = torch.randn(shape, dtype=dtype).contiguous(memory_format=layout)
        expected = F.max_pool2d(x, *window)
        y = _C.max_pool2d(x, *window)
        assert torch.equal(y, expected)
        assert (y.dtype, y.stride()) == (expected.dtype, expected.stride())


@needs_kernels
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_max_of_numbers_that_are_none(dtype: torch.dtype, layout: torch.memory_format) -> None:
    values = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -1.0], dtype=dtype)
    x = values[torch.randint(5, (2, 20, 11, 13))].contiguous(memory_format=layout)
    for window in WINDOWS:
        torch.testing.assert_close(_C.max_pool2d(x, *window), F.max_pool2d(x, *window), equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("kernel", "stride"), [((2, 2), (2, 2)), ((3, 2), (1, 3)), ((7, 7), (7, 7)), ((1, 1), (2, 2))])
def test_average_equals_the_mean_of_windows(
    kernel: tuple[int, int], stride: tuple[int, int], dtype: torch.dtype, layout: torch.memory_format
) -> None:
    for shape in ((2, 5, 7, 9), (1, 33, 14, 12), (3, 16, 8, 40), (1, 1, 9, 70)):
        x = torch.randn(shape, dtype=dtype).contiguous(memory_format=layout)
        windows = x.double().unfold(2, kernel[0], stride[0]).unfold(3, kernel[1], stride[1])
        y = _C.avg_pool2d(x, kernel, stride)
        limit = 1e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(y.double(), windows.mean((4, 5)), rtol=limit, atol=limit)
        assert (y.dtype, y.stride()) == (dtype, F.avg_pool2d(x, kernel, stride).stride())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 5, 7, 7), (1, 33, 3, 5), (3, 4, 1, 1), (2, 3, 40, 30), (0, 3, 7, 7)])
def test_global_average_equals_the_mean(
    shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format
) -> None:
    x = torch.randn(shape, dtype=dtype).contiguous(memory_format=layout)
    pooling = pooling_of(nn.AdaptiveAvgPool2d(1))
    assert pooling is not None
    y = pooling(x)
    limit = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(y.double(), x.double().mean((2, 3), keepdim=True), rtol=limit, atol=limit)
    assert (y.dtype, y.stride()) == (dtype, F.adaptive_avg_pool2d(x, 1).stride())


def test_parts_of_larger_tensors() -> None:
    large = torch.randn(2, 40, 20, 20)
    for x in (large.contiguous(memory_format=torch.channels_last)[:, 3:30], large[:, ::2], large[:, :, 2:, 1:]):
        assert torch.equal(_C.max_pool2d(x, (3, 3), (2, 2), (1, 1), (1, 1), False), F.max_pool2d(x, 3, 2, 1))
        torch.testing.assert_close(_C.avg_pool2d(x, (2, 2), (2, 2)), F.avg_pool2d(x, 2))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equal_on_any_number_of_threads(layout: torch.memory_format) -> None:
    x = torch.randn(3, 40, 57, 61).contiguous(memory_format=layout)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append((_C.max_pool2d(x, (3, 3), (2, 2), (1, 1), (1, 1), False), _C.avg_pool2d(x, (3, 3), (2, 2))))
    finally:
        torch.set_num_threads(before)
    for one, other in itertools.pairwise(results):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


@pytest.mark.parametrize(
    "window",
    [
        ((0, 2), (2, 2), (0, 0), (1, 1), False),
        ((2, 2), (0, 2), (0, 0), (1, 1), False),
        ((2, 2), (2, 2), (2, 0), (1, 1), False),
        ((2, 2), (2, 2), (0, 0), (0, 1), False),
        ((2, 2), (2, 2), (-1, 0), (1, 1), False),
        ((9, 2), (2, 2), (0, 0), (1, 1), False),
    ],
)
def test_pytorch_says_what_is_wrong_with_a_window(window: tuple[Any, ...]) -> None:
    x = torch.randn(1, 2, 6, 6)
    with pytest.raises(RuntimeError) as expected:
        torch.max_pool2d(x, *window)
    with pytest.raises(RuntimeError) as raised:
        _C.max_pool2d(x, *window)
    assert str(raised.value) == str(expected.value)


def test_what_watches_calls_sees_pytorchs() -> None:
    class Seen(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    x = torch.randn(2, 4, 6, 6)
    window = (2, 2), (2, 2), (0, 0), (1, 1), False
    with Seen() as seen:
        _C.max_pool2d(x, *window)
    assert any("max_pool2d" in name for name in seen.names)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        for y in (_C.max_pool2d(dual, *window), _C.avg_pool2d(dual, (2, 2), (2, 2))):
            tangent = torch.autograd.forward_ad.unpack_dual(y).tangent
            assert tangent is not None
            assert torch.equal(tangent, torch.ones(2, 4, 3, 3))
    y = torch.func.vmap(lambda part: _C.max_pool2d(part, *window))(x[:, None])
    assert torch.equal(y[:, 0], F.max_pool2d(x, 2))
    x.requires_grad_()
    _C.max_pool2d(x, *window).sum().backward()
    assert x.grad is not None
    assert int(x.grad.sum()) == 2 * 4 * 9


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_plans_with_poolings(layout: torch.memory_format) -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 24, 3), nn.Conv2d(24, 24, 3)
            self.max, self.mean, self.all = nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d((1, 1))
            self.linear = nn.Linear(24, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = F.max_pool2d(torch.relu(self.first(self.max(x))), 2, stride=1)
            return self.linear(torch.flatten(self.all(torch.relu(self.second(self.mean(x)))), 1))

    model = bk.swap_(Classifier().eval())
    bk.attach_(model, bk.ChannelTable.random(model, domains=["birds"], density=0.5, seed=0))
    bk.set_domain(model, "birds")
    planned = bk.plan(model, torch.randn(2, 3, 40, 40).contiguous(memory_format=layout), "birds")
    for size in (40, 65):
        x = torch.randn(3, 3, size, size).contiguous(memory_format=layout)
        torch.testing.assert_close(planned(x), model(x), rtol=1e-5, atol=1e-5)
    assert all(name in str(planned) for name in ("MaxPool2d", "AvgPool2d", "AdaptiveAvgPool2d"))
    assert planned.peak_bytes() > 0
