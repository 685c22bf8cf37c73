"""Cases, tolerances and checks for tests of the ops, here and in code that builds on them."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

import bap_kernels
from bap_kernels import reference
from bap_kernels.testing_cases import (
    LAYOUTS,
    LISTS,
    Case,
    Sample,
    index_list,
    lay_out,
    make_fused,
    make_tensors,
    moved,
    poison,
    random_case,
    unlisted,
)

__all__ = [
    "LAYOUTS",
    "LISTS",
    "TOLERANCES",
    "Case",
    "Sample",
    "assert_close",
    "check_backward",
    "check_forward",
    "check_fused",
    "declined",
    "index_list",
    "lay_out",
    "make_fused",
    "make_tensors",
    "moved",
    "poison",
    "random_case",
    "run",
    "unlisted",
]

# dtype -> (rtol, atol for one term). The rounding of a sum of independent terms of about 1 grows with the root of their
# number: `assert_close` multiplies atol with it. That of the 16-bit types leaves room for operands rounded once more.
TOLERANCES: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-11, 1e-13),
    torch.float32: (1e-5, 8e-6),
    torch.float16: (2e-3, 1e-3),
    torch.bfloat16: (1.2e-2, 6e-3),
}


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype, depth: int) -> None:
    """Asserts that ``actual`` has dtype ``dtype`` and the shape and values of ``expected``, within ``TOLERANCES``.

    Args:
        expected: float64, of a reference.
        depth: number of products in one element; the absolute tolerance grows with its root.
    """
    assert actual.dtype == dtype, f"expected dtype {dtype}, got {actual.dtype}"
    assert expected.dtype == torch.float64, f"expected a float64 reference, got {expected.dtype}"
    rtol, atol = TOLERANCES[dtype]
    atol *= max(1, depth) ** 0.5
    torch.testing.assert_close(actual.detach().cpu().double(), expected, rtol=rtol, atol=atol)


def run(sample: Sample, backend: str = "auto", cache_packed: bool = False) -> Tensor:
    """The op's result from one backend."""
    with bap_kernels.use_backend(backend):
        return torch.ops.bap_kernels.gathered_conv2d(*sample.args, cache_packed)


def _assert_follows(result: Tensor, input: Tensor) -> None:
    # Strides of an input with one channel or one pixel name two formats, and those of a strided input none.
    formats = [f for f in (torch.contiguous_format, torch.channels_last) if input.is_contiguous(memory_format=f)]
    follows = result.numel() == 0 or not formats or any(result.is_contiguous(memory_format=f) for f in formats)
    assert follows, f"expected the memory format of the input's strides {input.stride()}, got {result.stride()}"


def declined(backend: str, error: NotImplementedError) -> bool:
    """Whether a named backend refused a case that it does not cover; any other refusal is raised again."""
    if backend in ("auto", "aten") or f"(): expected a call that backend `{backend}` can run" not in str(error):
        raise error
    return True


def check_forward(case: Case, backend: str = "auto", device: str = "cpu") -> bool:
    """Asserts the op's values, dtype and memory format on ``case`` against both references.

    Returns:
        False where the named backend does not cover the case and said so.
    """
    sample = make_tensors(case)
    expected = reference.gathered_conv2d(*sample.args)
    assert_close(reference.conv_on_selected(*sample.args), expected, torch.float64, sample.depth)
    sample = sample.to(device)
    try:
        actual = run(sample, backend)
    except NotImplementedError as error:
        return not declined(backend, error)
    assert_close(actual, expected, case.dtype, sample.depth)
    _assert_follows(actual, sample.input)
    return True


def check_fused(
    case: Case,
    flags: Sequence[str],
    backend: str = "auto",
    vector_dtype: torch.dtype | None = None,
    residual_layout: str = "contiguous",
    device: str = "cpu",
    dual_store: str | None = None,
) -> bool:
    """Asserts the fused op's values with flags of make_fused, and its second store by a list; as check_forward.

    Args:
        dual_store: the kind of that list; None: there is no second store.
    """
    sample = make_tensors(case)
    fused = make_fused(sample, flags, vector_dtype or case.dtype, residual_layout, case.seed)
    expected = reference.gathered_conv2d_fused(*sample.args, **fused)
    if dual_store:
        fused["dual_store_index"] = index_list(dual_store, sample.kept[1], random.Random(case.seed))
    sample = sample.to(device)
    fused = {k: moved(v, device) if isinstance(v, Tensor) else v for k, v in fused.items()}
    try:
        with bap_kernels.use_backend(backend):
            actual, second = torch.ops.bap_kernels._gathered_conv2d_fused(*sample.args, **fused)
    except NotImplementedError as error:
        return not declined(backend, error)
    # Scales of standard normal size can double the terms; one more rounding for each transform.
    assert_close(actual, expected, case.dtype, 4 * sample.depth + 4)
    _assert_follows(actual, sample.input)
    assert (second is not None) == (dual_store is not None)
    if second is not None:
        expected = actual.index_select(1, fused["dual_store_index"])
        assert torch.equal(second, expected), "the second store differs from the result"
        _assert_follows(second, sample.input)
    return True


def check_backward(case: Case, backend: str = "auto", grad_layout: str = "contiguous", device: str = "cpu") -> bool:
    """Asserts the gradients in input, weight and bias on ``case``; returns as check_forward.

    Args:
        grad_layout: that of the result's gradient, one of ``LAYOUTS``.
    """
    sample = make_tensors(case)
    generator = torch.Generator().manual_seed(case.seed)
    grad = torch.randn(sample.output_shape, generator=generator, dtype=torch.float64).to(case.dtype)
    grad = lay_out(grad, grad_layout)
    expected = reference.gathered_conv2d_backward(grad, *sample.args[:2], *sample.args[3:])
    sample, grad = sample.to(device), moved(grad, device)
    leaves = [t for t in (sample.input, sample.weight, sample.bias) if t is not None]
    for leaf in leaves:
        leaf.requires_grad_()
    try:
        with bap_kernels.use_backend(backend):
            y = torch.ops.bap_kernels.gathered_conv2d(*sample.args)
            actual = torch.autograd.grad(y, leaves, grad, materialize_grads=True)
    except NotImplementedError as error:
        return not declined(backend, error)
    pixels = grad.shape[0] * grad.shape[2] * grad.shape[3]
    taps = sample.weight.shape[2] * sample.weight.shape[3]
    # ATen adds the taps of an input's gradient in its own dtype, 16 bits or not.
    depths = (taps * taps * (1 if case.depthwise else sample.kept[1]), pixels, pixels)
    for got, want, depth in zip(actual, expected, depths, strict=False):
        assert_close(got, want, case.dtype, depth)
    return True
