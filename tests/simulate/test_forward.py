"""The forward through the op, on every axis of its contract, against the loops of the reference."""

from __future__ import annotations

import random

import pytest
import torch

import bap_kernels
from bap_kernels import reference
from bap_kernels.testing import (
    LAYOUTS,
    LISTS,
    Case,
    assert_close,
    check_forward,
    check_fused,
    make_tensors,
    poison,
    random_case,
    run,
)

BASE = Case(in_channels=40, out_channels=36, size=(5, 8))
WIDE = Case(in_channels=136, out_channels=144, size=(11, 12), batch=1, in_list="all", out_list="null")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FLAGS = ("in_scale", "in_shift", "in_relu", "out_scale", "out_shift", "residual", "out_relu")
POINTWISE = BASE.but(kernel=(1, 1), padding=(0, 0, 0, 0))


def runs(case: Case) -> None:
    assert check_forward(case, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (3, 2)])
def test_kernels_and_dtypes(kernel: tuple[int, int], layout: str, dtype: torch.dtype) -> None:
    padding = (kernel[0] // 2, kernel[0] // 2, kernel[1] // 2, kernel[1] // 2)
    for stride in ((1, 1), (2, 1)):
        runs(BASE.but(kernel=kernel, padding=padding, stride=stride, layout=layout, dtype=dtype))


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)])
def test_several_tiles(kernel: tuple[int, int], layout: str, dtype: torch.dtype) -> None:
    padding = (kernel[0] // 2,) * 4
    runs(WIDE.but(kernel=kernel, padding=padding, layout=layout, dtype=dtype))


@pytest.mark.parametrize("kernel", [(1, 1), (3, 2)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, kernel: tuple[int, int]) -> None:
    runs(BASE.but(layout=layout, kernel=kernel, weight_layout="transposed"))


@pytest.mark.parametrize("out_list", LISTS)
@pytest.mark.parametrize("in_list", LISTS)
def test_lists(in_list: str, out_list: str) -> None:
    # Each kind of list meets both layouts, on either side.
    layout = ("contiguous", "channels_last")[(LISTS.index(in_list) + LISTS.index(out_list)) % 2]
    runs(POINTWISE.but(in_list=in_list, out_list=out_list, layout=layout, bias=out_list != "null"))


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("b", [8, 16, 32])
def test_blocks(b: int, dtype: torch.dtype, kernel: tuple[int, int]) -> None:
    case = BASE.but(in_channels=192, kernel=kernel, layout="channels_last", dtype=dtype, in_list="null")
    sample = make_tensors(case)
    # Out of order, so that no block follows from the one before.
    blocks = random.Random(b).sample(range(192 // b), 192 // b - 2)
    sample.in_index = torch.tensor([b * block + c for block in blocks for c in range(b)], dtype=torch.int32)
    poison(sample)
    assert_close(run(sample, "cuda"), reference.gathered_conv2d(*sample.args), dtype, sample.depth)


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_batches(batch: int) -> None:
    runs(BASE.but(batch=batch))
    runs(POINTWISE.but(batch=batch))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_uneven_padding_dilation_and_strides(layout: str) -> None:
    runs(BASE.but(padding=(2, 0, 1, 3), dilation=(2, 1), layout=layout))
    runs(BASE.but(padding=(0, 0, 0, 0), stride=(2, 3), layout=layout))
    runs(BASE.but(kernel=(5, 7), padding=(4, 4, 6, 6), size=(1, 3), in_channels=3, layout=layout))
    # Padding of a 1x1 kernel: results that meet no pixel at all.
    runs(POINTWISE.but(padding=(1, 2, 0, 1), stride=(2, 1), layout=layout))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", [(1, 1), (3, 2)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_everything_fused(layout: str, kernel: tuple[int, int], dtype: torch.dtype) -> None:
    # Few channels: rounding what the prologue makes to 16 bits is a part of every term.
    case = BASE.but(in_channels=20, out_channels=18, layout=layout, kernel=kernel, dtype=dtype)
    for residual in ("contiguous", "channels_last"):
        assert check_fused(case, FLAGS, "cuda", residual_layout=residual)
        assert check_fused(case, FLAGS[3:], "cuda", torch.float32, residual_layout=residual)


@pytest.mark.parametrize("flag", FLAGS)
def test_each_fused_part(flag: str) -> None:
    for case in (POINTWISE, POINTWISE.but(layout="channels_last"), BASE.but(bias=False)):
        assert check_fused(case, (flag,), "cuda", vector_dtype=torch.float32)


@pytest.mark.parametrize("residual", LAYOUTS)
def test_residuals_of_every_layout(residual: str) -> None:
    for case in (POINTWISE, POINTWISE.but(layout="channels_last", out_list="null")):
        assert check_fused(case, ("residual", "out_relu"), "cuda", residual_layout=residual)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_unlisted_channels_never_reach_the_output(layout: str, value: float) -> None:
    for case in (BASE.but(layout=layout), POINTWISE.but(layout=layout)):
        expected = reference.gathered_conv2d(*make_tensors(case).args)
        sample = poison(make_tensors(case), value)
        assert_close(run(sample, "cuda"), expected, case.dtype, sample.depth)


def test_tf32_where_torch_allows_it() -> None:
    sample = make_tensors(BASE.but(in_channels=64, layout="channels_last", in_list="null"))
    exact = reference.gathered_conv2d(*sample.args)
    full = (run(sample, "cuda").double() - exact).abs().max()
    torch.backends.cudnn.allow_tf32 = True
    rounded = (run(sample, "cuda").double() - exact).abs().max()
    assert full < 1e-4
    # Both operands keep 11 bits: what 576 products of about 1 then miss.
    assert 1e-3 < rounded < 6 * 576**0.5 * 2**-11


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinity_in_listed_channels(dtype: torch.dtype) -> None:
    sample = make_tensors(POINTWISE.but(layout="channels_last", in_list="null", dtype=dtype))
    sample.input[0, 3, 2, 2] = torch.inf
    y = run(sample, "cuda")
    reached = y.isfinite().logical_not()
    assert bool(reached[0, :, 2, 2].all())
    assert int(reached.sum()) == y.shape[1]
    # The two parts of a float32 weight may have different signs, and infinities of both signs add up to NaN.
    if dtype != torch.float32:
        assert bool(y[0, :, 2, 2].isinf().all())


def test_the_packed_weight_is_kept_and_follows_changes() -> None:
    sample = make_tensors(BASE.but(layout="channels_last"))
    bap_kernels.clear_packed_cache()
    first = run(sample, "cuda", cache_packed=True)
    assert bap_kernels.packed_cache_info()["entries"] == 1
    sample.weight.mul_(2)
    if sample.bias is not None:
        sample.bias.mul_(2)
    assert torch.equal(run(sample, "cuda", cache_packed=True), 2 * first)


def test_lists_that_change_in_place_are_read_again() -> None:
    sample = make_tensors(POINTWISE.but(in_channels=32, layout="channels_last", in_list="null"))
    sample.in_index = torch.arange(16, dtype=torch.int32)
    run(sample, "cuda")
    sample.in_index.copy_(torch.arange(1, 17))
    assert_close(run(sample, "cuda"), reference.gathered_conv2d(*sample.args), torch.float32, sample.depth)


def small(seed: int) -> Case:
    case = random_case(random.Random(seed))
    if case.dtype == torch.float64:
        case = case.but(dtype=torch.float32)
    least = [case.dilation[d] * (case.kernel[d] - 1) + 1 for d in (0, 1)]
    size = (min(case.size[0], least[0] + 6), min(case.size[1], least[1] + 6))
    return case.but(depthwise=False, size=size, batch=min(case.batch, 2))


@pytest.mark.parametrize("seed", range(30))
def test_random_cases(seed: int) -> None:
    runs(small(seed))
    assert check_fused(small(seed + 100), random.Random(seed).sample(FLAGS, 3), "cuda")
