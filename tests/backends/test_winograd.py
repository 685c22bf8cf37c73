"""Winograd convolutions of the native kernels, on every instruction set of this machine, with tiles of either size."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from torch import Tensor

import bap_kernels as bk
from bap_kernels import _C, reference
from bap_kernels.testing import Case, Sample, index_list, lay_out, make_fused, make_tensors, poison, run

pytestmark = [
    pytest.mark.skipif(bool(_C.unsupported_reason("native")), reason=str(_C.unsupported_reason("native"))),
    pytest.mark.usefixtures("isa", "nan_filled_empty"),
]

BASE = Case(batch=2, in_channels=37, out_channels=41, size=(9, 11))
LAYOUTS = ("contiguous", "channels_last")


def bound(size: int, kept: int) -> float:
    """Of the error, relative to the largest result; as docs/kernels/cpu.md states it."""
    return (2 + 0.5 * kept**0.5) * 1e-6 if size == 4 else (1 + 0.1 * kept**0.5) * 1e-6


def direct(sample: Sample) -> Tensor:
    size = _C.forced_winograd()
    _C.force_winograd(0)
    y = run(sample, "native")
    _C.force_winograd(size)
    return y


def assert_near(actual: Tensor, expected: Tensor, relative: float) -> None:
    assert actual.dtype == torch.float32
    assert actual.shape == expected.shape
    error, largest = float((actual.double() - expected).abs().max()), float(expected.abs().max())
    assert error <= relative * largest, f"error {error:.2e} of {largest:.2e}"


def check(case: Case, size: int) -> None:
    sample = make_tensors(case)
    y = run(sample, "native")
    expected = reference.conv_on_selected(*sample.args)
    assert_near(y, expected, bound(size, sample.kept[0]))
    formats = [f for f in (torch.contiguous_format, torch.channels_last) if sample.input.is_contiguous(memory_format=f)]
    assert not formats or any(y.is_contiguous(memory_format=f) for f in formats)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_result_equals_loops(layout: str, size: int) -> None:
    sample = make_tensors(BASE.but(layout=layout))
    y = run(sample, "native")
    assert_near(y, reference.gathered_conv2d(*sample.args), bound(size, sample.kept[0]))
    assert not torch.equal(y, direct(sample)), "this was the direct convolution"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_sizes_of_images(layout: str, size: int) -> None:
    for height in range(1, 18):
        check(BASE.but(batch=1 + height % 3, size=(height, 18 - height), layout=layout, seed=height), size)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("side", range(4))
def test_paddings(side: int, layout: str, size: int) -> None:
    for pad, others in itertools.product(range(4), range(3)):
        padding = [others] * 4
        padding[side] = pad
        check(BASE.but(padding=tuple(padding), layout=layout), size)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("in_list", "out_list"), itertools.product(("null", "one", "odd", "all", "shuffled"), repeat=2)
)
def test_lists(in_list: str, out_list: str, layout: str, size: int) -> None:
    check(BASE.but(in_list=in_list, out_list=out_list, layout=layout), size)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 100])
def test_counts_of_channels(channels: int, layout: str, size: int) -> None:
    for in_list in ("null", "all"):
        check(BASE.but(in_channels=channels, in_list=in_list, out_list="null", layout=layout), size)
        check(BASE.but(out_channels=channels, in_list=in_list, out_list="null", layout=layout), size)


@pytest.mark.parametrize("weight_layout", ["contiguous", "channels_last", "stepped"])
@pytest.mark.parametrize("layout", ["sliced", "sliced_last", "stepped", "expanded", "transposed"])
def test_strided_tensors(layout: str, weight_layout: str, size: int) -> None:
    check(BASE.but(layout=layout, weight_layout=weight_layout), size)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape",
    [(1, 16, 16, 70, 75), (1, 16, 40, 20, 300), (17, 16, 16, 13, 9), (2, 300, 33, 19, 23), (2, 70, 41, 24, 20)],
)
def test_many_blocks(shape: tuple[int, ...], layout: str, size: int) -> None:
    batch, C_in, C_out, height, width = shape
    check(Case(batch, C_in, C_out, (height, width), layout=layout, in_list="null", out_list="null"), size)


FLAGS = ("in_scale", "in_shift", "in_relu", "out_scale", "out_shift", "residual", "out_relu")


@pytest.mark.parametrize("residual_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("flags", [*((flag,) for flag in FLAGS), FLAGS, FLAGS[:3], FLAGS[3:]], ids="+".join)
def test_fused(flags: tuple[str, ...], layout: str, residual_layout: str, size: int) -> None:
    sample = make_tensors(BASE.but(layout=layout))
    fused = make_fused(sample, flags, torch.float32, residual_layout)
    expected = reference.gathered_conv2d_fused(*sample.args, **fused)
    fused["dual_store_index"] = index_list("odd", sample.kept[1], random.Random(0))
    with bk.use_backend("native"):
        y, second = torch.ops.bap_kernels._gathered_conv2d_fused(*sample.args, **fused)
    # A scale may make a sum the largest that a shift then makes small.
    assert_near(y, expected, 4 * bound(size, sample.kept[0]))
    assert torch.equal(second, y.index_select(1, fused["dual_store_index"]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weight_index(layout: str, size: int) -> None:
    sample = make_tensors(BASE.but(layout=layout, in_list="null", out_list="null"))
    in_index, kept = torch.tensor([1, 4, 5, 9], dtype=torch.int32), torch.tensor([2, 30, 7, 36], dtype=torch.int32)
    compact = lay_out(sample.input[:, :10].clone(), layout)
    with bk.use_backend("native"):
        y, _ = torch.ops.bap_kernels._gathered_conv2d_fused(
            compact,
            sample.weight,
            sample.bias,
            in_index,
            *sample.args[4:],
            **make_fused(sample, (), torch.float32),
            weight_index=kept,
        )
    expected = torch.nn.functional.conv2d(
        compact[:, in_index.long()].double(), sample.weight[:, kept.long()].double(), sample.bias.double(), padding=1
    )
    assert_near(y, expected, bound(size, 4))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(4, 40, 70, 14, 14), (1, 20, 40, 33, 35), (3, 64, 96, 7, 7)])
def test_threads_do_not_change_results(shape: tuple[int, ...], layout: str, size: int) -> None:
    batch, C_in, C_out, height, width = shape
    sample = make_tensors(Case(batch, C_in, C_out, (height, width), layout=layout))
    threads = torch.get_num_threads()
    results = []
    try:
        # With 48, rows of tiles are cut as well.
        for count in (1, 2, 3, 48):
            torch.set_num_threads(count)
            results.append(run(sample, "native"))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert torch.equal(results[0], result)
    alone = make_tensors(Case(batch, C_in, C_out, (height, width), layout=layout))
    alone.input = lay_out(alone.input[:1].clone(), layout)
    assert torch.equal(run(alone, "native"), results[0][:1]), "a sample's result depends on the batch"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_have_equal_results(layout: str, size: int) -> None:
    results = [run(make_tensors(BASE.but(layout=layout)), "native") for layout in LAYOUTS]
    assert torch.equal(*results)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_unlisted_channels_never_reach_the_output(value: float, layout: str, size: int) -> None:
    for in_list in ("odd", "shuffled", "one"):
        case = BASE.but(layout=layout, in_list=in_list)
        expected = reference.gathered_conv2d(*make_tensors(case).args)
        sample = poison(make_tensors(case), value)
        assert_near(run(sample, "native"), expected, bound(size, sample.kept[0]))


def test_listed_nan_spreads_over_its_tile_alone(size: int) -> None:
    sample = make_tensors(BASE.but(batch=1, size=(17, 17), padding=(0, 0, 0, 0), in_list="null", out_list="null"))
    clean = run(sample, "native")
    sample.input[0, 3, 8, 8] = math.nan
    y = run(sample, "native")
    reached = torch.isnan(y)
    assert reached[0, :, 6:9, 6:9].all(), "results whose window holds the value"
    rows, columns = torch.nonzero(reached.any(dim=1)[0], as_tuple=True)
    # Tiles whose (size + 2) x (size + 2) pixels hold it.
    first, last = (8 - size - 1) // size * size, (8 // size + 1) * size - 1
    assert first <= int(rows.min())
    assert int(rows.max()) <= last
    assert first <= int(columns.min())
    assert int(columns.max()) <= last
    assert torch.equal(y[~reached], clean[~reached])


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("kept", [64, 256, 512])
def test_error_bound(kept: int, relu: bool, size: int, isa: str) -> None:
    if isa.endswith("_emulated") and kept > 64:
        pytest.skip("slow; its arithmetic is that of the others")
    x, weight = torch.randn(2, kept, 14, 14), torch.randn(40, kept, 3, 3)
    x = x.relu() if relu else x
    with bk.use_backend("native"):
        y = bk.gathered_conv2d(x, weight, padding=1)
    assert_near(y, torch.nn.functional.conv2d(x.double(), weight.double(), padding=1), bound(size, kept))


@pytest.mark.parametrize(
    "case",
    [
        BASE.but(stride=(2, 1)),
        BASE.but(stride=(1, 2)),
        BASE.but(dilation=(2, 1)),
        BASE.but(dilation=(1, 2)),
        BASE.but(kernel=(3, 1), padding=(1, 1, 0, 0)),
        BASE.but(kernel=(1, 3), padding=(0, 0, 1, 1)),
        BASE.but(kernel=(5, 5), padding=(2, 2, 2, 2)),
        BASE.but(dtype=torch.bfloat16),
    ],
    ids=["rows2", "columns2", "dilated_rows", "dilated_columns", "3x1", "1x3", "5x5", "bfloat16"],
)
def test_other_convolutions_stay_direct(case: Case, size: int) -> None:
    sample = make_tensors(case)
    assert torch.equal(run(sample, "native"), direct(sample))


def test_weight_is_kept_and_follows_changes(size: int) -> None:
    bk.clear_packed_cache()
    sample = make_tensors(BASE)
    first = run(sample, "native", cache_packed=True)
    misses = _C.packed_cache_info()["misses"]
    assert torch.equal(run(sample, "native", cache_packed=True), first)
    assert _C.packed_cache_info()["misses"] == misses
    sample.weight.mul_(2)
    y = run(sample, "native", cache_packed=True)
    assert_near(y, reference.conv_on_selected(*sample.args), bound(size, sample.kept[0]))
    other = make_tensors(BASE.but(in_list="shuffled", seed=1))
    sample.in_index = other.in_index
    y = run(sample, "native", cache_packed=True)
    assert_near(y, reference.conv_on_selected(*sample.args), bound(size, sample.kept[0]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("threads", [1, 2])
def test_mixed_batch(layout: str, size: int, threads: int) -> None:
    sample = make_tensors(BASE.but(batch=11, layout=layout, in_list="null", out_list="null"))
    first_list, other = torch.arange(0, 37, 2, dtype=torch.int32), torch.arange(30, 3, -3, dtype=torch.int32)
    # Samples of one list are computed together, wherever they are in the batch.
    lists = [first_list, None, other, first_list.clone(), None, first_list, other]
    counts = [1, 3, 2, 1, 1, 2, 1]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    with bk.use_backend("native"):
        y = torch.ops.bap_kernels._gathered_conv2d_mixed(
            sample.input, sample.weight, sample.bias, lists, counts, (1, 1), (1, 1, 1, 1), (1, 1)
        )
    torch.set_num_threads(before)
    first = 0
    for index, count in zip(lists, counts, strict=True):
        x = sample.input[first : first + count]
        listed = slice(None) if index is None else index.long()
        expected = torch.nn.functional.conv2d(
            x[:, listed].double(), sample.weight[:, listed].double(), sample.bias.double(), padding=1
        )
        assert_near(y[first : first + count], expected, bound(size, 37))
        with bk.use_backend("native"):
            alone = bk.gathered_conv2d(x, sample.weight, sample.bias, index, padding=1)
        assert torch.equal(y[first : first + count], alone)
        first += count
