"""The fused op with a second, compact copy of its result, bit-equal to index_select of the result."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bap_kernels
from bap_kernels import _C
from bap_kernels.testing import Case, Sample, check_fused, make_fused, make_tensors, random_case

pytestmark = pytest.mark.usefixtures("nan_filled_empty")

ops = torch.ops.bap_kernels
FLAGS = ("in_scale", "in_shift", "in_relu", "out_scale", "out_shift", "residual", "out_relu")
BASE = Case(in_channels=19, out_channels=13, size=(9, 14), out_list="null")
LAYOUTS = ("contiguous", "channels_last")


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def check_dual(case: Case, flags: Sequence[str], backend: str, kind: str = "odd") -> bool:
    return check_fused(case, flags, backend, torch.float32, dual_store=kind)


def dual(sample: Sample, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return ops._gathered_conv2d_fused(*sample.args, None, None, False, None, None, None, False, dual_store_index=index)


@pytest.mark.parametrize("layout", [*LAYOUTS, "sliced", "sliced_last", "expanded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dual_store_equals_index_select(dtype: torch.dtype, layout: str, backend: str) -> None:
    for flags in ((), ("out_shift", "residual", "out_relu"), ("out_max",), FLAGS):
        ran = check_dual(BASE.but(dtype=dtype, layout=layout), flags, backend)
        assert ran or dtype in (torch.float16, torch.float64)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["zero", "one", "odd", "all", "shuffled"])
def test_dual_store_is_right_for_each_kind_of_list(kind: str, layout: str, backend: str) -> None:
    for out_list in ("null", "odd", "one"):
        assert check_dual(BASE.but(layout=layout, out_list=out_list), ("out_relu",), backend, kind)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dual_store_of_empty_reductions_is_right(layout: str, backend: str) -> None:
    for wrong in ({"batch": 0}, {"in_list": "zero"}, {"out_list": "zero"}):
        check_dual(BASE.but(layout=layout, **wrong), ("out_shift", "residual"), backend)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dual_store_is_right_for_depthwise_and_single_pixel(layout: str, backend: str) -> None:
    check_dual(BASE.but(depthwise=True, out_list="odd", layout=layout), FLAGS, backend)
    check_dual(BASE.but(kernel=(1, 1), padding=(0,) * 4, size=(1, 1), layout=layout), FLAGS, backend)


@pytest.mark.parametrize("chunk", range(2))
def test_dual_store_equals_index_select_on_random_cases(chunk: int, backend: str) -> None:
    for seed in range(7000 + 25 * chunk, 7025 + 25 * chunk):
        rng = random.Random(seed)
        case = random_case(rng)
        flags = [flag for flag in FLAGS if rng.random() < 0.5]
        try:
            check_dual(case, flags, backend, rng.choice(("odd", "shuffled", "one", "all")))
        except Exception as error:
            raise AssertionError(f"seed {seed}, flags {flags}, {backend}: {case}") from error


def test_second_store_does_not_alias_result() -> None:
    for layout in LAYOUTS:
        y, second = dual(make_tensors(BASE.but(layout=layout)), torch.arange(13, dtype=torch.int32))
        kept = y.clone()
        second.zero_()
        assert torch.equal(y, kept)


def test_dual_store_works_with_compact_input_and_packed_weights() -> None:
    sample = make_tensors(BASE.but(in_list="null"))
    read = ints(3, 17, 4, 0)
    args = (sample.input[:, read.long()], *sample.args[1:])
    for _ in range(2):
        y, second = ops._gathered_conv2d_fused(
            *args, None, None, False, None, None, None, False, True, read, ints(2, 11)
        )
        expected, _ = ops._gathered_conv2d_fused(*args, None, None, False, None, None, None, False, True, read)
        assert torch.equal(y, expected)
        assert torch.equal(second, expected[:, [2, 11]])


def test_direct_call_equals_op() -> None:
    sample = make_tensors(BASE)
    fused = make_fused(sample, FLAGS, torch.float32)
    ordered = [fused[name] for name in FLAGS]
    geometry = (sample.stride, sample.padding, sample.dilation, 1)
    expected = ops._gathered_conv2d_fused(*sample.args, *ordered, False, None, ints(1, 5))
    actual = _C.gathered_conv2d_fused(*sample.args[:5], *geometry, *ordered, False, None, ints(1, 5), None)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_invalid_dual_store_list_raises(device: str) -> None:
    sample = make_tensors(BASE).to(device)
    for wrong, error, rule in (
        (torch.tensor([1, 2], device=device), TypeError, r"`dual_store_index` to be an int32 list, got Long"),
        (ints(1, 2)[None].to(device), ValueError, r"`dual_store_index` to be 1-D, got 2 dim"),
        (
            ints(1, 2).to("cpu" if device == "meta" else "meta"),
            ValueError,
            r"`dual_store_index` to be on the input's device .*, got ",
        ),
    ):
        with pytest.raises(error, match=r"_gathered_conv2d_fused\(\): expected " + rule):
            dual(sample, wrong)
    with pytest.raises(ValueError, match=r"_gathered_conv2d_fused\(\): expected `residual` to have the result"):
        ops._gathered_conv2d_fused(
            *sample.args, None, None, False, None, None, sample.input, False, False, None, ints(0).to(device)
        )


def test_dual_store_list_out_of_range_raises() -> None:
    sample = make_tensors(BASE.but(out_list="odd"))
    kept = sample.kept[1]
    with pytest.raises(
        IndexError, match=rf"`dual_store_index` to hold channel numbers from 0 to {kept - 1}, got {kept}"
    ):
        dual(sample, ints(0, kept))
    with pytest.raises(IndexError, match=r"`dual_store_index` to hold channel numbers from 0 to .*, got -1"):
        dual(sample, ints(-1))
    with pytest.raises(ValueError, match=r"`dual_store_index` to hold each channel at most once, got channel 1"):
        dual(sample, ints(1, 0, 1))


def test_input_that_requires_grad_raises() -> None:
    sample = make_tensors(BASE)
    sample.weight.requires_grad_()
    with pytest.raises(NotImplementedError, match=r"_gathered_conv2d_fused\(\): expected tensors that need no"):
        dual(sample, ints(0))
    with torch.no_grad():
        dual(sample, ints(0))


def test_flops_count_convolution_once() -> None:
    sample = make_tensors(BASE)
    counts = []
    for call in (lambda: dual(sample, ints(0, 4)), lambda: ops.gathered_conv2d(*sample.args)):
        with FlopCounterMode(display=False) as counter:
            call()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_in_place_change_of_dual_store_list_is_used(backend: str) -> None:
    sample, index = make_tensors(BASE), ints(0, 4, 7)
    with bap_kernels.use_backend(backend):
        for _ in range(3):
            y, second = dual(sample, index)
            assert torch.equal(second, y[:, index.long()])
            index.add_(1)
