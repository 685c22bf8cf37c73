"""Shapes for which PyTorch's CPU convolution is wrong or crashes go another way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import bap_kernels as bk
from bap_kernels import _C

ROOT = Path(__file__).parents[2]
BACKENDS = [
    "aten",
    "auto",
    pytest.param(
        "native",
        marks=pytest.mark.skipif(
            _C.unsupported_reason("native") is not None, reason=f"backend native: {_C.unsupported_reason('native')}"
        ),
    ),
]


def run_search(*args: str) -> subprocess.CompletedProcess[str]:
    # The search preloads an allocator that fills memory with NaN, and its cases may crash.
    command = [sys.executable, "-m", "tools.search_convolution_faults", *args]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_known_faulty_shapes_are_right(backend: str) -> None:
    process = run_search("--known", "--through", backend)
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stdout.strip().splitlines()[-1].startswith("0 faults")


@pytest.mark.parametrize("backend", ["aten", "auto"])
def test_quick_search_finds_no_fault(backend: str) -> None:
    process = run_search("--quick", "--narrow", "--seed", "3", "--through", backend)
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stdout.strip().splitlines()[-1].startswith("0 faults")


def uses_im2col(x: torch.Tensor, w: torch.Tensor, backward: bool = False, **options: int) -> bool:
    """Whether the aten backend avoids PyTorch's own convolution."""
    before = _C.get_backend()
    _C.set_backend("aten")
    try:
        with torch.autograd.profiler.profile() as profile:
            y = bk.gathered_conv2d(x, w.requires_grad_(backward), **options)
            if backward:
                y.sum().backward()
    finally:
        _C.set_backend(before)
    names = {event.name for event in profile.function_events}
    assert ("aten::im2col" in names) != ("aten::convolution" in names)
    return "aten::im2col" in names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_common_layers_use_pytorchs_convolution(dtype: torch.dtype) -> None:
    for c, size, kernel, stride, padding, groups in (
        (3, 56, 7, 2, 3, 1),  # stems
        (3, 32, 16, 16, 0, 1),
        (3, 32, 4, 4, 0, 1),
        (64, 14, 3, 1, 1, 1),
        (64, 14, 3, 2, 1, 1),
        (64, 7, 1, 1, 0, 1),
        (32, 14, 1, 2, 0, 1),
        (64, 1, 1, 1, 0, 1),  # squeeze and excitation
        (32, 2, 3, 1, 1, 1),
        (32, 14, 5, 1, 2, 32),
        (32, 14, 7, 1, 3, 32),
    ):
        x, w = torch.ones(1, c, size, size, dtype=dtype), torch.ones(c, c // groups, kernel, kernel, dtype=dtype)
        # Two output columns with a stride avoid it in every dtype, by the margin of the rule.
        expected = kernel == 16
        assert uses_im2col(x, w, stride=stride, padding=padding, groups=groups) == expected


def test_faulty_shapes_use_im2col() -> None:
    def avoids(
        dtype: torch.dtype, x: tuple[int, ...], w: tuple[int, ...], backward: bool = False, **options: int
    ) -> bool:
        return uses_im2col(torch.ones(x, dtype=dtype), torch.ones(w, dtype=dtype), backward, **options)

    half, full, double = torch.bfloat16, torch.float32, torch.float64
    assert avoids(full, (2, 1, 9, 3), (4, 1, 3, 3), stride=2)  # one output column
    assert avoids(half, (2, 8, 9, 5), (4, 8, 3, 3), stride=3)
    assert avoids(half, (2, 8, 9, 1), (4, 8, 1, 1), padding=1)  # padding alone is read
    assert avoids(half, (2, 16, 32, 32), (4, 16, 4, 4), stride=4)  # wrong with AMX
    assert not avoids(full, (2, 16, 32, 32), (4, 16, 4, 4), stride=4)
    assert not avoids(double, (2, 1, 9, 3), (4, 1, 3, 3), stride=2)  # oneDNN has no float64 kernel
    assert not avoids(full, (2, 1, 9, 9), (4, 1, 1, 1), stride=3)


def test_large_im2col_is_split_into_parts() -> None:
    # 8 channels, 8 x 8 taps, 40 x 41 outputs: ten times the size of one part.
    torch.manual_seed(0)
    x = torch.randint(-2, 3, (100, 8, 47, 48)).bfloat16()
    w = torch.randint(-2, 3, (2, 8, 8, 8)).bfloat16().requires_grad_()
    _C.set_backend("aten")
    try:
        y = bk.gathered_conv2d(x, w)
        y[:, :, ::13, ::13].sum().backward()
    finally:
        _C.set_backend("auto")
    wide = w.detach().double().requires_grad_()
    expected = torch.nn.functional.conv2d(x.double(), wide)
    expected[:, :, ::13, ::13].sum().backward()
    torch.testing.assert_close(y.double(), expected, rtol=1e-2, atol=1)
    torch.testing.assert_close(w.grad.double(), wide.grad, rtol=1e-2, atol=1)


@pytest.mark.parametrize("groups", [4, 2], ids=["depthwise", "grouped"])
def test_planned_faulty_shapes_are_right(groups: int) -> None:
    # One output column with a stride of 2, and output rows that read padding only.
    model = nn.Sequential(nn.Conv2d(4, 8 if groups == 2 else 4, 2, (1, 2), (2, 0), groups=groups)).eval().bfloat16()
    x = torch.randn(2, 4, 5, 3).bfloat16().to(memory_format=torch.channels_last)
    weight, bias = model[0].weight.detach().double(), model[0].bias.detach().double()
    expected = nn.functional.conv2d(x.double(), weight, bias, (1, 2), (2, 0), 1, groups)
    with torch.no_grad():
        result = bk.plan(bk.swap_(model), x)(x)
    torch.testing.assert_close(result.double(), expected, rtol=0.02, atol=0.02)


def test_switched_layer_without_domain_is_right_for_faulty_shape() -> None:
    layer = bk.nn.SwitchedConv2d(1, 3, 2, (1, 2), domains=["a"])
    x = torch.randn(2, 1, 4, 3).to(memory_format=torch.channels_last)
    expected = nn.functional.conv2d(x.double(), layer.weight.double(), layer.bias.double(), (1, 2))
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
