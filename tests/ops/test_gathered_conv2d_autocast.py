"""Autocast on the CPU casts to the requested dtype, as for ``F.conv2d``."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bap_kernels.testing import Case, make_tensors

op = torch.ops.bap_kernels.gathered_conv2d
CASE = Case(in_channels=9, out_channels=7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_autocast_uses_requested_dtype(dtype: torch.dtype, bias: bool) -> None:
    sample = make_tensors(CASE.but(bias=bias))
    with torch.autocast("cpu", dtype):
        y = op(*sample.args)
    cast = [None if t is None else t.to(dtype) for t in sample.args[:3]]
    assert y.dtype == dtype
    assert torch.equal(y, op(*cast, *sample.args[3:]))


def test_autocast_ignores_float64() -> None:
    sample = make_tensors(CASE.but(dtype=torch.float64))
    with torch.autocast("cpu", torch.bfloat16):
        assert op(*sample.args).dtype == F.conv2d(sample.input, sample.weight).dtype


def test_nested_autocast_uses_inner_setting() -> None:
    sample = make_tensors(CASE)
    plain = op(*sample.args)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            inner = op(*sample.args)
        with torch.autocast("cpu", torch.float16):
            assert op(*sample.args).dtype == torch.float16
        assert op(*sample.args).dtype == torch.bfloat16
    assert inner.dtype == torch.float32
    assert torch.equal(inner, plain)
    assert op(*sample.args).dtype == torch.float32


def test_mixed_dtypes_require_autocast() -> None:
    sample = make_tensors(CASE)
    sample.input = sample.input.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert op(*sample.args).dtype == torch.bfloat16
    with pytest.raises(TypeError, match=r"expected `weight` to have the input's dtype"):
        op(*sample.args)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_have_dtype_of_parameters(dtype: torch.dtype) -> None:
    sample = make_tensors(CASE)
    leaves = [t.requires_grad_() for t in (sample.input, sample.weight, sample.bias)]
    with torch.autocast("cpu", dtype):
        y = op(*sample.args)
    grad = torch.randn_like(y)
    result = torch.autograd.grad(y, leaves, grad)
    assert [g.dtype for g in result] == [torch.float32] * 3
    expected = torch.autograd.grad(op(*sample.args), leaves, grad.float())
    for a, b in zip(result, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=3e-2, atol=1.5e-1)
