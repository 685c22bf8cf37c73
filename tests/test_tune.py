"""`bap_kernels.tune` without Triton; tests/interpret has the other tests."""

from __future__ import annotations

import pytest
import torch

import bap_kernels as bk
from bap_kernels.settings import read_environment


@pytest.mark.skipif(bk.dispatch.unsupported_reason("triton") is None, reason="Triton can run here")
def test_tune_without_triton_raises_with_reason() -> None:
    with pytest.raises(ImportError, match="got 'triton': "):
        bk.tune(torch.nn.Conv2d(3, 4, 3), torch.randn(1, 3, 8, 8))


def test_autotune_variable_is_parsed() -> None:
    assert read_environment({}).autotune is False
    assert read_environment({"BAP_KERNELS_AUTOTUNE": "0"}).autotune is False
    assert read_environment({"BAP_KERNELS_AUTOTUNE": "1"}).autotune is True
    with pytest.raises(ValueError, match="expected `BAP_KERNELS_AUTOTUNE` to be one of 0, 1, got 'yes'"):
        read_environment({"BAP_KERNELS_AUTOTUNE": "yes"})
