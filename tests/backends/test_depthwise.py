"""Depthwise convolutions of the native kernels, on every instruction set of this machine, against loops in float64."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

import bap_kernels as bk
from bap_kernels import _C
from bap_kernels.testing import Case, check_forward, check_fused, make_fused, make_tensors, poison, run

pytestmark = [
    pytest.mark.skipif(bool(_C.unsupported_reason("native")), reason=str(_C.unsupported_reason("native"))),
    pytest.mark.usefixtures("isa", "nan_filled_empty"),
]

BASE = Case(batch=2, in_channels=37, size=(9, 11), depthwise=True, in_list="null")
LAYOUTS = ("contiguous", "channels_last")
EPILOGUE = ("out_scale", "out_shift", "residual", "out_relu", "out_max")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 3), (5, 5), (7, 7), (1, 5)])
def test_result_equals_loops(kernel: tuple[int, int], layout: str, dtype: torch.dtype) -> None:
    for stride in ((1, 1), (2, 2), (3, 1)):
        padding = (kernel[0] // 2, kernel[0] // 2, kernel[1] // 2, kernel[1] // 2)
        case = BASE.but(kernel=kernel, stride=stride, padding=padding, layout=layout, dtype=dtype)
        assert check_forward(case, "native")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [2, 3, 4, 7, 8, 9, 16, 17, 31, 32, 33, 48, 65])
def test_any_number_of_channels(channels: int, layout: str) -> None:
    assert check_forward(BASE.but(in_channels=channels, layout=layout), "native")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stride", [(1, 1), (2, 2)])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (2, 2), (3, 5), (7, 7), (14, 14), (5, 35), (40, 33)])
def test_any_size_of_image(size: tuple[int, int], stride: tuple[int, int], layout: str) -> None:
    assert check_forward(BASE.but(in_channels=9, size=size, stride=stride, layout=layout), "native")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("padding", [(0, 0, 0, 0), (0, 1, 0, 1), (2, 0, 1, 3), (5, 4, 6, 7)])
def test_any_padding(padding: tuple[int, int, int, int], layout: str) -> None:
    # The last is larger than the kernel: some results read nothing.
    for stride in ((1, 1), (2, 2)):
        for dilation in ((1, 1), (2, 3)):
            case = BASE.but(in_channels=10, padding=padding, stride=stride, dilation=dilation, layout=layout)
            assert check_forward(case, "native")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_combination_of_what_is_fused(layout: str, dtype: torch.dtype) -> None:
    for count in range(len(EPILOGUE) + 1):
        for flags in itertools.combinations(EPILOGUE, count):
            assert check_fused(BASE.but(layout=layout, dtype=dtype, size=(4, 5), seed=count), flags, "native"), flags


@pytest.mark.parametrize("kind", ["odd", "one", "all", "shuffled"])
def test_lists_of_planes(kind: str) -> None:
    assert check_forward(BASE.but(in_list=kind), "native")


@pytest.mark.parametrize("layout", ["sliced", "stepped", "transposed", "expanded"])
def test_strided_inputs(layout: str) -> None:
    assert check_forward(BASE.but(layout=layout), "native")
    assert check_forward(BASE.but(layout=layout, stride=(2, 2)), "native")


def test_random_cases() -> None:
    rng = random.Random(5)
    for seed in range(150):
        kernel = rng.choice(((3, 3), (3, 3), (5, 5), (2, 2), (1, 3)))
        case = BASE.but(
            batch=rng.randint(1, 3),
            in_channels=rng.randint(2, 40),
            size=(rng.randint(7, 20), rng.randint(7, 40)),
            kernel=kernel,
            stride=(rng.randint(1, 3), rng.randint(1, 3)),
            padding=tuple(rng.randint(0, 3) for _ in range(4)),
            dilation=(rng.randint(1, 2), rng.randint(1, 2)),
            layout=rng.choice(LAYOUTS),
            dtype=rng.choice((torch.float32, torch.bfloat16)),
            seed=seed,
        )
        flags = [flag for flag in EPILOGUE if rng.random() < 0.5]
        assert check_fused(case, flags, "native"), (case, flags)


def test_nan_of_unlisted_planes_stays_out() -> None:
    case = BASE.but(in_list="odd")
    assert run(poison(make_tensors(case)), "native").equal(run(make_tensors(case), "native"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_of_a_channel_stays_there(layout: str) -> None:
    sample = make_tensors(BASE.but(layout=layout))
    expected = run(sample, "native")
    sample.input[:, 4] = torch.nan
    y = run(sample, "native")
    assert y[:, 4].isnan().all()
    others = [channel for channel in range(37) if channel != 4]
    assert y[:, others].equal(expected[:, others])
    fused = make_fused(sample, ("out_relu", "out_max"), torch.float32)
    with bk.use_backend("native"):
        clamped, _ = torch.ops.bap_kernels._gathered_conv2d_fused(*sample.args, **fused)
    assert clamped[:, 4].isnan().all(), "a ReLU keeps NaN"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_do_not_depend_on_threads_or_batch(layout: str) -> None:
    sample = make_tensors(BASE.but(batch=3, in_channels=40, size=(40, 41), layout=layout))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = run(sample, "native")
        for count in (2, 3, 5):
            torch.set_num_threads(count)
            assert run(sample, "native").equal(expected)
    finally:
        torch.set_num_threads(threads)
    whole = sample.input
    sample.input = whole[1:2]
    assert run(sample, "native").equal(expected[1:2])


def test_what_is_not_covered_is_refused() -> None:
    case = BASE.but(in_list="odd", layout="channels_last")
    with pytest.raises(NotImplementedError, match="some channels of a channels_last input"):
        run(make_tensors(case), "native")
    assert check_forward(case, "auto")
    sample = make_tensors(BASE)
    with bk.use_backend("native"), pytest.raises(NotImplementedError, match="behind an input transform"):
        torch.ops.bap_kernels._gathered_conv2d_fused(*sample.args, **make_fused(sample, ("in_relu",), torch.float32))
