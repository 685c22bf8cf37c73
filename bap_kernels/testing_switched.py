"""Samples and checks for tests of the switched convolution; cases, layouts and tolerances are those of ``testing``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import bap_kernels
from bap_kernels import reference
from bap_kernels.testing import TOLERANCES, Case, assert_close, declined, lay_out, make_tensors, moved

__all__ = [
    "SwitchedSample",
    "assert_gradients",
    "check_switched",
    "check_switched_backward",
    "expected_gradients",
    "make_switched",
    "poison_switched",
    "run_switched",
]


@dataclass
class SwitchedSample:
    """The tensors and options of a case, as the ops take them."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    switch: Tensor
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int

    @property
    def args(self) -> tuple[Any, ...]:
        """Positional arguments of ``torch.ops.bap_kernels.switched_conv2d`` and of the references."""
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    @property
    def backward_args(self) -> tuple[Any, ...]:
        """The same without the bias, as the backward takes them after ``grad_output``."""
        return (*self.args[:2], *self.args[3:])

    @property
    def tensors(self) -> list[Tensor]:
        """Input, weight, bias (where there is one) and switch."""
        return [t for t in self.args[:4] if t is not None]

    @property
    def off(self) -> Tensor:
        """Which channels are off, bool, (C_in,)."""
        return self.switch.detach() == 0

    @property
    def depth(self) -> int:
        """Number of terms in one output element."""
        kept = 1 if self.groups != 1 else int(self.switch.count_nonzero())
        return kept * self.weight.shape[2] * self.weight.shape[3]

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        """(N, C_out, oH, oW)."""
        size = reference.output_size(
            self.input.shape[2:], self.weight.shape[2:], self.stride, self.padding, self.dilation
        )
        return self.input.shape[0], self.weight.shape[0], *size

    def to(self, device: torch.device | str) -> SwitchedSample:
        """The sample on another device, with the strides and the memory around its tensors."""
        return dataclasses.replace(
            self,
            input=moved(self.input, device),
            weight=moved(self.weight, device),
            bias=None if self.bias is None else moved(self.bias, device),
            switch=moved(self.switch, device),
        )


def make_switched(case: Case, switch_dtype: torch.dtype = torch.float32) -> SwitchedSample:
    """Tensors of ``case``: on is what its ``in_list`` holds ("null": everything); it computes all outputs."""
    sample = make_tensors(case.but(out_list="null"))
    switch = torch.full((case.in_channels,), 1 if sample.in_index is None else 0, dtype=switch_dtype)
    if sample.in_index is not None:
        switch[sample.in_index.long()] = 1
    options = sample.stride, sample.padding, sample.dilation, sample.groups
    return SwitchedSample(sample.input, sample.weight, sample.bias, switch, *options)


def poison_switched(sample: SwitchedSample, value: float = torch.nan) -> SwitchedSample:
    """The sample with ``value`` in what its switch has off, of input and weight; they must not overlap themselves."""
    sample.input[:, sample.off] = value
    if sample.groups == 1:
        sample.weight[:, sample.off] = value
    else:
        sample.weight[sample.off] = value
    return sample


def run_switched(sample: SwitchedSample, backend: str = "auto", off_gradient: bool = True) -> Tensor:
    """The op's result from one backend."""
    with bap_kernels.use_backend(backend):
        return torch.ops.bap_kernels.switched_conv2d(*sample.args, off_gradient)


def check_switched(case: Case, backend: str = "auto", device: str = "cpu") -> bool:
    """Asserts the op's values, dtype and shape on ``case`` against both references.

    Returns:
        False where the named backend does not cover the case and said so.
    """
    sample = make_switched(case)
    expected = reference.switched_conv2d(*sample.args)
    assert_close(reference.conv_on_masked(*sample.args), expected, torch.float64, sample.depth)
    try:
        actual = run_switched(sample.to(device), backend)
    except NotImplementedError as error:
        return not declined(backend, error)
    assert_close(actual, expected, case.dtype, sample.depth)
    meta = torch.ops.bap_kernels.switched_conv2d(*sample.to("meta").args)
    reaching = [dim for dim, size in enumerate(actual.shape) if size > 1 and actual.numel() > 0]
    assert [meta.stride(dim) for dim in reaching] == [actual.stride(dim) for dim in reaching]
    return True


def expected_gradients(sample: SwitchedSample, grad: Tensor, off_gradient: bool = True) -> tuple[Tensor, ...]:
    """Gradients in ``sample.tensors``, float64, by autograd of the dense convolution of the masked input.

    That route gives slices that are off a zero only where everything is finite; it needs at least one channel.
    """
    leaves = [t.detach().double().requires_grad_() for t in sample.tensors]
    bias = leaves[2] if sample.bias is not None else None
    y = reference.conv_on_masked(leaves[0], leaves[1], bias, leaves[-1], *sample.args[4:])
    gradients = torch.autograd.grad(y, leaves, grad.double())
    if off_gradient:
        return gradients
    return (*gradients[:-1], gradients[-1].masked_fill(sample.off, 0))


def assert_gradients(sample: SwitchedSample, actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Asserts gradients in ``sample.tensors``: dtypes, values, and exact zeros where the switch is off."""
    dtype, taps = sample.input.dtype, sample.weight.shape[2] * sample.weight.shape[3]
    filters = 1 if sample.groups != 1 else sample.weight.shape[0]
    n, _, height, width = sample.output_shape
    pixels = n * height * width
    # ATen adds the taps of an input's gradient, and the images of a weight's, in their own dtype, 16 bits or not.
    images = n if dtype in (torch.bfloat16, torch.float16) else 1
    depths = [taps * taps * filters, images * pixels, *([pixels] if sample.bias is not None else [])]
    for got, want, depth in zip(actual[:-1], expected[:-1], depths, strict=True):
        assert_close(got, want, dtype, depth)
    switch, depth = actual[-1], max(1, taps * taps * filters * images * pixels)
    assert switch.dtype == sample.switch.dtype
    # Its products have the rounding of the input's dtype, its sum that of its own.
    rtol, atol = TOLERANCES[torch.float32 if dtype == torch.float64 != switch.dtype else dtype]
    torch.testing.assert_close(switch.detach().cpu().double(), expected[-1], rtol=rtol, atol=atol * depth**0.5)
    off = sample.off.cpu()
    assert not actual[0].detach().cpu()[:, off].any()
    weight = actual[1].detach().cpu()
    assert not (weight[:, off] if sample.groups == 1 else weight[off]).any()


def check_switched_backward(
    case: Case,
    backend: str = "auto",
    grad_layout: str = "contiguous",
    off_gradient: bool = True,
    device: str = "cpu",
    loops: bool = True,
) -> bool:
    """Asserts all gradients on ``case`` against autograd of the masked dense convolution.

    Args:
        grad_layout: that of the result's gradient, one of ``LAYOUTS``.
        loops: also checks them against the loops of :mod:`bap_kernels.reference`, which take their time.

    Returns:
        False where the named backend does not cover the case and said so.
    """
    sample = make_switched(case)
    generator = torch.Generator().manual_seed(case.seed)
    grad = torch.randn(sample.output_shape, generator=generator, dtype=torch.float64).to(case.dtype)
    grad = lay_out(grad, grad_layout)
    expected = expected_gradients(sample, grad, off_gradient)
    if loops:
        by_loops = reference.switched_conv2d_backward(grad, *sample.backward_args, off_gradient)  # type: ignore[call-arg]
        for one, other in zip(by_loops if case.bias else (*by_loops[:2], by_loops[3]), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    there, grad = sample.to(device), moved(grad, device)
    leaves = [t.requires_grad_() for t in there.tensors]
    try:
        y = run_switched(there, backend, off_gradient)
        with bap_kernels.use_backend(backend):
            actual = torch.autograd.grad(y, leaves, grad)
    except NotImplementedError as error:
        return not declined(backend, error)
    assert_gradients(there, actual, expected)
    return True
