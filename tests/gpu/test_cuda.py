"""The CUDA C++ backend beside Triton, and what runs under compute-sanitizer."""

from __future__ import annotations

import pytest
import torch

from bap_kernels import _C
from bap_kernels.testing import Case, assert_close, check_backward, check_forward, make_tensors, run
from bap_kernels.testing_switched import check_switched_backward

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("gpu_backend", ["cuda"], indirect=True)]

BASE = Case(in_channels=64, out_channels=48, size=(14, 16), layout="channels_last")
POINTWISE = BASE.but(kernel=(1, 1), padding=(0, 0, 0, 0), layout="contiguous")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.skipif(_C.why_not("triton") is not None, reason=f"backend triton: {_C.why_not('triton')}")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [BASE, POINTWISE], ids=["3x3", "1x1"])
def test_agrees_with_triton(case: Case, dtype: torch.dtype, gpu_backend: str) -> None:
    sample = make_tensors(case.but(dtype=dtype)).to("cuda")
    assert_close(run(sample, gpu_backend), run(sample, "triton").cpu().double(), dtype, sample.depth)


def test_small_cases_for_the_sanitizer(gpu_backend: str) -> None:
    """A launch of every kind: what tools/gpu_report.py runs under compute-sanitizer."""
    for dtype in DTYPES:
        for case in (BASE, POINTWISE, BASE.but(layout="contiguous", in_channels=19, size=(7, 5))):
            assert check_forward(case.but(dtype=dtype), gpu_backend, "cuda")
        assert check_backward(BASE.but(dtype=dtype, stride=(2, 2)), gpu_backend, device="cuda")
    check_switched_backward(BASE, gpu_backend, "channels_last", True, "cuda", loops=False)
