"""The CUDA C++ backend beside Triton, and what runs under compute-sanitizer."""

from __future__ import annotations

import pytest
import torch

import bap_kernels
from bap_kernels import _C, reference
from bap_kernels.testing import Case, assert_close, check_backward, check_forward, make_tensors, run
from bap_kernels.testing_switched import check_switched_backward

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("gpu_backend", ["cuda"], indirect=True)]

BASE = Case(in_channels=64, out_channels=48, size=(14, 16), layout="channels_last")
POINTWISE = BASE.but(kernel=(1, 1), padding=(0, 0, 0, 0), layout="contiguous")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.skipif(
    _C.unsupported_reason("triton") is not None, reason=f"backend triton: {_C.unsupported_reason('triton')}"
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [BASE, POINTWISE], ids=["3x3", "1x1"])
def test_agrees_with_triton(case: Case, dtype: torch.dtype, gpu_backend: str) -> None:
    sample = make_tensors(case.but(dtype=dtype)).to("cuda")
    assert_close(run(sample, gpu_backend), run(sample, "triton").cpu().double(), dtype, sample.depth)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("columns", [200, 512])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)])
def test_large_nhwc_layers(kernel: tuple[int, int], columns: int, dtype: torch.dtype, gpu_backend: str) -> None:
    """What devices that have warpgroups give to them, with every kind of list that needs no copy, and gradients."""
    case = Case(16, 256, columns, (28, 28), kernel, padding=(kernel[0] // 2,) * 4, layout="channels_last", dtype=dtype)
    for b in (0, 8, 32):
        sample = make_tensors(case.but(in_list="null"))
        if b:
            sample.in_index = torch.tensor([c for c in range(256) if c // b % 4 != 1], dtype=torch.int32)
        expected = reference.conv_on_selected(*sample.args)
        sample = sample.to("cuda")
        assert_close(run(sample, gpu_backend), expected, dtype, sample.depth)
        sample.input.requires_grad_()
        grads = []
        for backend in (gpu_backend, "aten"):
            with bap_kernels.use_backend(backend):
                y = torch.ops.bap_kernels.gathered_conv2d(*sample.args)
                grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
                grads += torch.autograd.grad(y, sample.input, grad.contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close(*grads, rtol=0.1, atol=0.5)


def test_small_cases_for_the_sanitizer(gpu_backend: str) -> None:
    """A launch of every kind: what tools/gpu_report.py runs under compute-sanitizer."""
    for dtype in DTYPES:
        for case in (BASE, POINTWISE, BASE.but(layout="contiguous", in_channels=19, size=(7, 5))):
            assert check_forward(case.but(dtype=dtype), gpu_backend, "cuda")
        assert check_backward(BASE.but(dtype=dtype, stride=(2, 2)), gpu_backend, device="cuda")
    wide = Case(8, 64, 136, (28, 28), layout="channels_last", dtype=torch.bfloat16, in_list="null")
    assert check_forward(wide, gpu_backend, "cuda")
    check_switched_backward(BASE, gpu_backend, "channels_last", True, "cuda", loops=False)
