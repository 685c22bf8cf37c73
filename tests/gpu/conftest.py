"""What the tests on a GPU share: backends that can run there, and the products of float32."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bap_kernels import _C
from bap_kernels.testing import TOLERANCES
from tests.kernel_contract import TF32


@pytest.fixture(params=("auto", "aten", "triton", "cuda"))
def gpu_backend(request: pytest.FixtureRequest) -> str:
    """Each backend that CUDA tensors can go through."""
    reason = _C.unsupported_reason(request.param)
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    return request.param


@pytest.fixture(autouse=True)
def _float32(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Products of full float32, but for the CUDA kernels, which have those of TF32 alone."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    parameters = getattr(request.node, "callspec", None)
    tf32 = parameters is not None and any(value == "cuda" for value in parameters.params.values() if type(value) is str)
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    if tf32:
        monkeypatch.setitem(TOLERANCES, torch.float32, TF32)
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
