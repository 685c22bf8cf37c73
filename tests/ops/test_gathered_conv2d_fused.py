"""The fused op: input transform, gathered convolution and output transform, against the loops of the reference."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

import bap_kernels
from bap_kernels import reference
from bap_kernels.testing import Case, assert_close, check_fused, make_fused, make_tensors, random_case

pytestmark = pytest.mark.usefixtures("nan_filled_empty")

FLAGS = ("in_scale", "in_shift", "in_relu", "out_scale", "out_shift", "residual", "out_relu", "out_max")
BASE = Case(in_channels=19, out_channels=13, size=(9, 14))
LAYOUTS = ("contiguous", "channels_last")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)])
@pytest.mark.parametrize("flag", FLAGS)
def test_fused_is_right_with_each_single_transform(
    flag: str, kernel: tuple[int, int], layout: str, backend: str
) -> None:
    pad = kernel[0] // 2
    for bias in (False, True):
        case = BASE.but(kernel=kernel, padding=(pad,) * 4, layout=layout, bias=bias)
        assert check_fused(case, (flag,), backend)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_is_right_with_every_combination_of_transforms(dtype: torch.dtype, layout: str, backend: str) -> None:
    for count in range(len(FLAGS) + 1):
        for flags in itertools.combinations(FLAGS, count):
            assert check_fused(BASE.but(layout=layout, dtype=dtype, size=(4, 5), seed=count), flags, backend), flags


@pytest.mark.parametrize("vectors", ["float32", "input"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_fused_supports_float32_vectors_with_each_dtype(dtype: torch.dtype, vectors: str, backend: str) -> None:
    vector_dtype = dtype if vectors == "input" else torch.float32
    ran = check_fused(BASE.but(dtype=dtype), FLAGS, backend, vector_dtype)
    assert ran or dtype in (torch.float16, torch.float64)


@pytest.mark.parametrize("residual", ["contiguous", "channels_last", "sliced", "sliced_last", "expanded", "transposed"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fused_is_right_for_each_residual_layout(layout: str, residual: str, backend: str) -> None:
    assert check_fused(BASE.but(layout=layout), ("residual",), backend, residual_layout=residual)
    assert check_fused(BASE.but(layout=layout), FLAGS, backend, residual_layout=residual)


@pytest.mark.parametrize("layout", ["sliced", "sliced_last", "expanded", "transposed", "stepped"])
def test_fused_is_right_for_each_input_layout(layout: str, backend: str) -> None:
    assert check_fused(BASE.but(layout=layout), FLAGS, backend)


KINDS = (("zero", "null"), ("null", "zero"), ("zero", "zero"), ("null", "null"), ("one", "one"))


@pytest.mark.parametrize("kinds", KINDS)
def test_fused_is_right_for_empty_and_null_lists(kinds: tuple[str, str], backend: str) -> None:
    for flags in (FLAGS, ("out_shift", "out_relu"), ("in_shift", "residual")):
        check_fused(BASE.but(in_list=kinds[0], out_list=kinds[1]), flags, backend)


def test_fused_accepts_empty_batch(backend: str) -> None:
    check_fused(BASE.but(batch=0), FLAGS, backend)


def test_padding_is_not_transformed(backend: str) -> None:
    # If the shift of 1 applied to padding too, border sums would equal inner ones.
    case = Case(1, 4, 4, (6, 6), in_list="null", out_list="null", bias=False)
    sample = make_tensors(case)
    sample.input.zero_()
    sample.weight.fill_(1)
    with bap_kernels.use_backend(backend):
        y, _ = torch.ops.bap_kernels._gathered_conv2d_fused(
            *sample.args, None, torch.ones(4), False, None, None, None, False
        )
    assert (y[..., 1:-1, 1:-1] == 36).all()
    assert (y[..., 0, 1:-1] == 24).all()
    assert (y[..., 0, 0] == 16).all()


def test_fused_depthwise_is_right(backend: str) -> None:
    for layout in LAYOUTS:
        check_fused(BASE.but(depthwise=True, layout=layout), FLAGS, backend)


@pytest.mark.parametrize("chunk", range(4))
def test_fused_equals_reference_on_random_cases(chunk: int, backend: str) -> None:
    for seed in range(1000 + 25 * chunk, 1025 + 25 * chunk):
        rng = random.Random(seed)
        case = random_case(rng)
        flags = [flag for flag in FLAGS if rng.random() < 0.5]
        residual = rng.choice(("contiguous", "channels_last", "sliced"))
        try:
            check_fused(case, flags, backend, rng.choice((torch.float32, case.dtype)), residual)
        except Exception as error:
            raise AssertionError(f"seed {seed}, flags {flags}, residual {residual}, {backend}: {case}") from error


def test_batch_norm_as_output_transform_equals_module() -> None:
    sample = make_tensors(BASE.but(out_list="null"))
    norm = torch.nn.BatchNorm2d(13).eval()
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            tensor.normal_()
        norm.running_var.uniform_(0.5, 2)
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        shift = norm.bias - norm.running_mean * scale
        expected = torch.relu(norm.double()(reference.conv_on_selected(*sample.args)))
    y, _ = torch.ops.bap_kernels._gathered_conv2d_fused(*sample.args, None, None, False, scale, shift, None, True)
    assert_close(y, expected, torch.float32, 4 * sample.depth)


def test_transforms_share_packed_weights() -> None:
    sample = make_tensors(BASE)
    plain = torch.ops.bap_kernels.gathered_conv2d(*sample.args, True)
    for flags in (("out_shift",), ("in_scale",), (), ("residual", "out_relu")):
        fused = make_fused(sample, flags, torch.float32)
        expected = reference.gathered_conv2d_fused(*sample.args, **fused)
        y, _ = torch.ops.bap_kernels._gathered_conv2d_fused(*sample.args, **fused, cache_packed=True)
        assert_close(y, expected, torch.float32, 4 * sample.depth)
    assert torch.equal(torch.ops.bap_kernels.gathered_conv2d(*sample.args, True), plain)


def test_fused_input_that_requires_grad_raises() -> None:
    x, w = torch.randn(1, 4, 5, 5), torch.randn(3, 4, 1, 1, requires_grad=True)
    args = (None, None, None, (1, 1), (0, 0, 0, 0), (1, 1), 1, None, None, False, None, None, None, True)
    with pytest.raises(NotImplementedError, match=r"_gathered_conv2d_fused\(\): expected tensors that need"):
        torch.ops.bap_kernels._gathered_conv2d_fused(x, w, *args)
    with torch.no_grad():
        y, _ = torch.ops.bap_kernels._gathered_conv2d_fused(x, w, *args)
    torch.testing.assert_close(y, torch.relu(torch.nn.functional.conv2d(x, w)))
