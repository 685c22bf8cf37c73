"""What the tests on a GPU share: backends that can run there, and products of full float32."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bap_kernels import _C


@pytest.fixture(params=("auto", "aten", "triton", "cuda"))
def gpu_backend(request: pytest.FixtureRequest) -> str:
    """Each backend that CUDA tensors can go through."""
    reason = _C.unsupported_reason(request.param)
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    return request.param


@pytest.fixture(autouse=True)
def _full_float32() -> Iterator[None]:
    # The table of tolerances is that of float32 products, not of TF32.
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
