"""Means of whole images in plans."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bap_kernels as bk
from bap_kernels.flow.ops import Call
from bap_kernels.plan.pooling import global_average, is_global_average


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (Call(nn.AdaptiveAvgPool2d(1)), True),
        (Call(nn.AdaptiveAvgPool2d((1, 1))), True),
        (Call(nn.AdaptiveAvgPool2d((1, 2))), False),
        (Call(nn.AdaptiveAvgPool2d((None, 1))), False),
        (Call(nn.AdaptiveMaxPool2d(1)), False),
        (Call(F.adaptive_avg_pool2d, (1,)), True),
        (Call(F.adaptive_avg_pool2d, output_size=[1, 1]), True),
        (Call(F.adaptive_avg_pool2d, (2,)), False),
        (Call(F.adaptive_max_pool2d, (1,)), False),
        (nn.AdaptiveAvgPool2d(1), False),
    ],
)
def test_which_calls_are_global_averages(call: object, expected: bool) -> None:
    assert is_global_average(call) is expected


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 5, 7, 7), (1, 33, 3, 5), (3, 4, 1, 1), (2, 3, 40, 30), (0, 3, 7, 7)])
def test_equals_the_mean(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> None:
    x = torch.randn(shape, dtype=dtype).contiguous(memory_format=layout)
    expected = x.double().mean((2, 3), keepdim=True)
    y = global_average(x)
    assert y.dtype == dtype
    limit = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(y.double(), expected, rtol=limit, atol=limit)
    assert y.stride() == F.adaptive_avg_pool2d(x, 1).stride()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@torch.no_grad()
def test_plan_with_any_size_of_images(layout: torch.memory_format) -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool, self.linear = nn.Conv2d(3, 24, 3), nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(24, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(torch.flatten(self.pool(torch.relu(self.conv(x))), 1))

    model = bk.swap_(Classifier().eval())
    x = torch.randn(2, 3, 9, 9).contiguous(memory_format=layout)
    planned = bk.plan(model, x)
    for size in (9, 30):
        x = torch.randn(3, 3, size, size).contiguous(memory_format=layout)
        torch.testing.assert_close(planned(x), model(x), rtol=1e-5, atol=1e-5)
    assert "adaptive_avg_pool2d" in str(planned) or "AdaptiveAvgPool2d" in str(planned)
