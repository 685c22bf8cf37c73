"""The contract of the forward, kernels in Triton's interpreter."""

from __future__ import annotations

from bap_kernels.testing import Case
from tests.kernel_contract import ForwardContract


class TestForward(ForwardContract):
    backend = "triton"
    base = Case(in_channels=20, out_channels=18, size=(5, 6))
    pointwise = base.but(kernel=(1, 1), padding=(0, 0, 0, 0))
    most = (21, 19)
