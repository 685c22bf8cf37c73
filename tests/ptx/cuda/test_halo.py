"""The convolution with a halo, on every axis of its contract, against the loops of the reference.

Every case says that the kernel took it: a compact copy in front of the convolution would pass the comparison as well.
"""

from __future__ import annotations

import random

import pytest
import torch

from bap_kernels import reference
from bap_kernels.testing import (
    LISTS,
    Case,
    assert_close,
    check_fused,
    lay_out,
    make_tensors,
    poison,
    random_case,
    run,
)
from bap_kernels.testing_switched import check_switched
from tests.ptx.cuda import device
from tests.ptx.cuda.device import CONV, PACK

BASE = Case(in_channels=40, out_channels=36, size=(9, 16), in_list="shuffled")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FLAGS = ("in_scale", "in_shift", "in_relu", "out_scale", "out_shift", "residual", "out_relu")


def launches(case: Case) -> list[str]:
    """The backend's launches for a case, in order."""
    sample = make_tensors(case)
    with device.launches() as names:
        run(sample, "cuda")
    return [name for name in names if name in (CONV, PACK)]


def runs(case: Case) -> None:
    expected = reference.gathered_conv2d(*make_tensors(case).args)
    sample = poison(make_tensors(case))
    assert_close(run(sample, "cuda"), expected, case.dtype, sample.depth)
    assert launches(case) == [CONV]


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kernel", [(3, 3), (1, 2), (5, 5), (7, 7)])
def test_kernels_and_dtypes(kernel: tuple[int, int], layout: str, dtype: torch.dtype) -> None:
    padding = (kernel[0] // 2, kernel[0] // 2, kernel[1] // 2, kernel[1] // 2)
    runs(BASE.but(kernel=kernel, padding=padding, layout=layout, dtype=dtype, batch=1))


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (2, 1), (1, 3)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_several_tiles_and_blocks_of_channels(layout: str, stride: tuple[int, int], dtype: torch.dtype) -> None:
    # More channels than three blocks of 16-bit elements hold; more columns than a small tile has, and the large one.
    wide = Case(in_channels=230, out_channels=90, size=(21, 40), batch=1, in_list="all", out_list="null")
    runs(wide.but(stride=stride, layout=layout, dtype=dtype))


# Widths whose rows start on 16, 8 and 4 bytes, and on single elements of 16 bits.
@pytest.mark.parametrize("width", [16, 12, 10, 13])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("left", [0, 1, 2, 5])
def test_alignments(left: int, dtype: torch.dtype, width: int) -> None:
    runs(BASE.but(size=(6, width), padding=(1, 0, left, 1), dtype=dtype, batch=3))


@pytest.mark.parametrize("layout", ["sliced", "sliced_last", "stepped", "expanded", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(dtype: torch.dtype, layout: str) -> None:
    runs(BASE.but(layout=layout, dtype=dtype, weight_layout="transposed"))


@pytest.mark.parametrize("out_list", LISTS)
@pytest.mark.parametrize("in_list", [kind for kind in LISTS if kind != "zero"])
def test_lists(in_list: str, out_list: str) -> None:
    case = BASE.but(in_list=in_list, out_list=out_list, bias=out_list != "null", size=(5, 8))
    expected = reference.gathered_conv2d(*make_tensors(case).args)
    sample = poison(make_tensors(case))
    assert_close(run(sample, "cuda"), expected, case.dtype, sample.depth)
    assert launches(case) == ([] if out_list == "zero" else [CONV])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_an_empty_list_needs_no_kernel(layout: str) -> None:
    case = BASE.but(in_list="zero", layout=layout)
    sample = make_tensors(case)
    assert_close(run(sample, "cuda"), reference.gathered_conv2d(*sample.args), case.dtype, 1)
    assert launches(case) == []


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_batches(layout: str, batch: int) -> None:
    case = BASE.but(batch=batch, layout=layout)
    sample = make_tensors(case)
    assert_close(run(sample, "cuda"), reference.gathered_conv2d(*sample.args), case.dtype, sample.depth)
    assert launches(case) == ([CONV] if batch else [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_uneven_padding_dilation_and_strides(layout: str, dtype: torch.dtype) -> None:
    for changes in (
        {"padding": (2, 0, 1, 3), "dilation": (2, 1)},
        {"padding": (0, 0, 0, 0), "stride": (2, 3), "dilation": (1, 2)},
        {"kernel": (5, 7), "padding": (4, 4, 6, 6), "size": (1, 3), "in_channels": 3},
        {"kernel": (2, 3), "padding": (0, 1, 2, 0), "stride": (3, 2), "size": (17, 23)},
        {"kernel": (1, 3), "padding": (0, 0, 5, 4), "dilation": (1, 4)},
    ):
        runs(BASE.but(layout=layout, dtype=dtype, **changes))


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_everything_fused(layout: str, dtype: torch.dtype) -> None:
    case = BASE.but(in_channels=20, out_channels=70, layout=layout, dtype=dtype)
    for residual in ("contiguous", "channels_last"):
        assert check_fused(case, FLAGS, "cuda", residual_layout=residual)
        assert check_fused(case, FLAGS[3:], "cuda", torch.float32, residual_layout=residual)


def test_a_prologue_needs_no_copy_and_stays_within_the_source() -> None:
    # Zeros of the padding stay zeros, whatever the shift makes of those within.
    for changes in ({}, {"layout": "channels_last"}, {"size": (7, 13)}, {"in_channels": 150, "dtype": torch.bfloat16}):
        case = BASE.but(padding=(2, 2, 2, 2), **changes)
        with device.launches() as names:
            assert check_fused(case, FLAGS[:3], "cuda", torch.float32)
        assert CONV in names
        assert PACK not in names


@pytest.mark.parametrize("flag", FLAGS)
def test_each_fused_part(flag: str) -> None:
    for case in (BASE, BASE.but(layout="channels_last", bias=False), BASE.but(size=(6, 13), out_list="null")):
        assert check_fused(case, (flag,), "cuda", vector_dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_listed_blocks_of_planes(layout: str, dtype: torch.dtype) -> None:
    # Lists of whole blocks reach the kernel as numbers of blocks, on planes.
    case = BASE.but(in_channels=96, layout=layout, dtype=dtype, in_list="null")
    for size in (8, 32):
        sample = make_tensors(case)
        sample.in_index = torch.tensor([c for c in range(96) if c // size % 2], dtype=torch.int32)
        assert_close(run(poison(sample), "cuda"), reference.gathered_conv2d(*sample.args), dtype, sample.depth)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_unlisted_channels_and_what_lies_around_never_reach_the_output(layout: str, value: float) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        case = BASE.but(layout=layout, dtype=dtype, in_channels=75)
        expected = reference.gathered_conv2d(*make_tensors(case).args)
        sample = poison(make_tensors(case), value)
        # The input in the midst of a larger one that holds nothing else but `value`.
        around = lay_out(torch.full((4, 75, 11, 32), value, dtype=dtype), layout)
        inner = around[1:3, :, 1:10, 8:24]
        sample.input = inner.copy_(sample.input)
        assert_close(run(sample, "cuda"), expected, dtype, sample.depth)


@pytest.mark.parametrize("kind", LISTS)
def test_switches(kind: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check_switched(BASE.but(in_channels=70, in_list=kind, dtype=dtype), "cuda")


def test_what_is_declined() -> None:
    assert launches(BASE.but(kernel=(9, 3), padding=(4, 4, 1, 1))) == [PACK, CONV]
    assert launches(BASE.but(kernel=(1, 1), padding=(0,) * 4, stride=(2, 1))) == [PACK, CONV]
    # Neighbours of a tile that are so far apart that its halo does not fit.
    assert launches(BASE.but(dilation=(8, 8), padding=(8,) * 4)) == [CONV]
    assert launches(BASE.but(size=(70, 70), dilation=(30, 30))) == [PACK, CONV]
    # Channels side by side and many columns: a compact copy is made once, a halo in each tile of columns.
    last = BASE.but(layout="channels_last", out_list="null", size=(4, 4))
    assert launches(last.but(out_channels=128)) == [CONV]
    assert launches(last.but(out_channels=129)) == [PACK, CONV]
    assert launches(BASE.but(out_channels=129, out_list="null", size=(4, 4))) == [CONV]


def test_results_do_not_vary() -> None:
    sample = make_tensors(BASE.but(in_channels=90))
    assert torch.equal(run(sample, "cuda"), run(sample, "cuda"))


@pytest.mark.parametrize("seed", range(24))
def test_random_cases(seed: int) -> None:
    case = random_case(random.Random(seed + 900))
    least = [case.dilation[d] * (case.kernel[d] - 1) + 1 for d in (0, 1)]
    kernel = case.kernel if max(case.kernel) > 1 else (3, 2)
    size = (max(least[0], kernel[0]) + seed % 5 + 4, max(least[1], kernel[1]) + seed % 7 + 6)
    small = case.but(
        dtype=DTYPES[seed % 3], depthwise=False, size=size, kernel=kernel, batch=min(case.batch, 2), in_channels=50
    )
    sample = poison(make_tensors(small))
    expected = reference.gathered_conv2d(*make_tensors(small).args)
    assert_close(run(sample, "cuda"), expected, small.dtype, sample.depth)
