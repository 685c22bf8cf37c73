"""The contract of the gradients, kernels in Triton's interpreter."""

from __future__ import annotations

import torch

from bap_kernels.testing import Case, make_tensors
from tests.kernel_contract import BackwardContract

BASE = Case(in_channels=18, out_channels=20, size=(5, 6))


class TestBackward(BackwardContract):
    backend = "triton"
    base = BASE
    pointwise = base.but(kernel=(1, 1), padding=(0, 0, 0, 0))
    most = (18, 17)


def test_results_do_not_vary() -> None:
    from bap_kernels.triton import ops

    sample = make_tensors(BASE.but(batch=4, size=(9, 9)))
    grad = torch.randn(sample.output_shape)
    arguments = (grad, *sample.args[:2], *sample.args[3:8], (True, True, True))
    first = ops.gathered_conv2d_backward(*arguments)
    for one, other in zip(first, ops.gathered_conv2d_backward(*arguments), strict=True):
        assert torch.equal(one, other)
