"""What only a GPU can say of the Triton backend alone."""

from __future__ import annotations

import pytest
import torch

import bap_kernels
from bap_kernels.testing import Case, make_tensors

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("gpu_backend", ["triton"], indirect=True)]


def test_the_backward_knows_the_backend(monkeypatch: pytest.MonkeyPatch, gpu_backend: str) -> None:
    """Its threads have not named it."""
    from bap_kernels.triton import ops

    calls = []
    real = ops.gathered_conv2d_backward
    monkeypatch.setattr(ops, "gathered_conv2d_backward", lambda *args: calls.append(1) or real(*args))
    sample = make_tensors(Case(in_channels=64, out_channels=48, size=(14, 16), layout="channels_last")).to("cuda")
    sample.weight.requires_grad_()
    with bap_kernels.use_backend(gpu_backend):
        torch.ops.bap_kernels.gathered_conv2d(*sample.args).sum().backward()
    assert len(calls) == 1
