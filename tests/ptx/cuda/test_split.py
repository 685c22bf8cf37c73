"""Sums that are cut into parts (split-K) where tiles leave most SMs idle: partial sums, and the launch that adds them.

Every case says that it was cut: whole sums give the same results.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import bap_kernels as bk
from bap_kernels import reference
from bap_kernels.testing import (
    LISTS,
    Case,
    assert_close,
    check_backward,
    check_fused,
    index_list,
    make_tensors,
    poison,
    run,
)
from bap_kernels.testing_switched import check_switched, check_switched_backward
from tests.ptx.cuda import device

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SMS = 132
# 35 pixels and 72 columns: less than a tile, and a tile and a bit; 27 steps of 16-bit elements, 45 of float32.
LONG = Case(
    in_channels=136, out_channels=72, size=(5, 7), batch=1, layout="channels_last", in_list="null", out_list="null"
)
POINTWISE = LONG.but(in_channels=1096, kernel=(1, 1), padding=(0, 0, 0, 0))


@pytest.fixture(autouse=True)
def _many_sms(_settings: None) -> None:
    device.set_device(SMS)


@contextmanager
def cut(kernel: str = "gathered_conv2d", times: int = 1) -> Iterator[None]:
    """Asserts that a kernel was launched so often, and each time the launch that adds the parts behind it."""
    with device.kernels() as names:
        yield
    convs = [name for name in names if name not in ("channel_pack", "channel_unpack", "sum_partials")]
    assert convs == [kernel, "split_epilogue"] * times


def runs(case: Case, kernel: str = "gathered_conv2d") -> None:
    sample = make_tensors(case)
    expected = reference.gathered_conv2d(*sample.args)
    with cut(kernel):
        y = run(poison(sample), "cuda")
    assert_close(y, expected, case.dtype, sample.depth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [20, 72, 136])
def test_tiles_and_dtypes(columns: int, dtype: torch.dtype) -> None:
    runs(LONG.but(dtype=dtype, out_channels=columns))
    runs(POINTWISE.but(dtype=dtype, out_channels=columns))


@pytest.mark.parametrize("sm_count", [5, 9, 33, 1_000_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_numbers_of_parts(dtype: torch.dtype, sm_count: int) -> None:
    # Two tiles: 2, 4 and 6 parts, of which no part begins with a block of channels, and as many as there may be.
    device.set_device(sm_count)
    runs(LONG.but(dtype=dtype))
    runs(LONG.but(dtype=dtype, kernel=(2, 3), padding=(1, 0, 2, 1), stride=(2, 1), dilation=(1, 2), in_channels=264))


@pytest.mark.parametrize("kind", LISTS)
def test_lists(kind: str) -> None:
    for dtype in DTYPES:
        case = LONG.but(in_channels=270, in_list=kind, dtype=dtype, out_channels=130)
        sample = make_tensors(case)
        with device.kernels() as names:
            y = run(poison(sample), "cuda")
        assert_close(y, reference.gathered_conv2d(*sample.args), dtype, sample.depth)
        assert ("split_epilogue" in names) == (kind not in ("zero", "one"))


@pytest.mark.parametrize("b", [8, 16, 32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks(dtype: torch.dtype, b: int) -> None:
    case = LONG.but(in_channels=256, dtype=dtype)
    sample = make_tensors(case)
    blocks = random.Random(b).sample(range(256 // b), 256 // b - 2)
    sample.in_index = torch.tensor([b * block + c for block in blocks for c in range(b)], dtype=torch.int32)
    with cut():
        y = run(poison(sample), "cuda")
    assert_close(y, reference.gathered_conv2d(*sample.args), dtype, sample.depth)


@pytest.mark.parametrize("residual", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_everything_fused(dtype: torch.dtype, residual: str) -> None:
    flags = ("out_scale", "out_shift", "residual", "out_relu")
    for columns, store in ((70, "odd"), (136, "shuffled")):
        with cut():
            assert check_fused(
                LONG.but(dtype=dtype, out_channels=columns, out_list="odd" if columns == 136 else "null"),
                *(flags, "cuda", torch.float32, residual),
                dual_store=store,
            )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_gradients_of_the_input(layout: str, dtype: torch.dtype) -> None:
    base = LONG.but(in_channels=72, out_channels=264, dtype=dtype, layout=layout)
    for case, times in (
        (base, 1),
        (base.but(in_list="odd"), 1),
        (base.but(stride=(2, 1), out_channels=520), 1),
        # Nine phases, in two launches.
        (base.but(stride=(9, 1), kernel=(9, 3), size=(19, 4), out_channels=400, in_list="shuffled"), 2),
    ):
        sample = make_tensors(case)
        grad = torch.randn(sample.output_shape, generator=torch.Generator().manual_seed(2)).to(dtype)
        grad = grad.contiguous(memory_format=torch.channels_last)
        with cut(times=times), bk.use_backend("cuda"):
            dx, _, _ = torch.ops.bap_kernels.gathered_conv2d_backward(
                grad, *sample.args[:2], *sample.args[3:], (True, False, False)
            )
        x = sample.input.double().requires_grad_()
        y = reference.conv_on_selected(x, sample.weight.double(), None, *sample.args[3:])
        (expected,) = torch.autograd.grad(y, x, grad.double())
        assert_close(dx, expected, dtype, case.out_channels * 9)


@pytest.mark.parametrize("off_gradient", [True, False])
@pytest.mark.parametrize("kind", ["zero", "one", "odd", "all"])
def test_switches(kind: str, off_gradient: bool) -> None:
    # What is on decides how many steps there are: for few channels, fewer than parts.
    case = POINTWISE.but(in_list=kind, out_channels=40, size=(3, 5), dtype=torch.bfloat16)
    with cut():
        assert check_switched(case, "cuda")
    case = case.but(in_channels=72, out_channels=1096, dtype=torch.float32)
    with device.kernels() as names:
        assert check_switched_backward(case, "cuda", "channels_last", off_gradient)
    # The forward of 72 channels is whole.
    assert [name for name in names if name in ("gathered_conv2d", "split_epilogue")][-2:] == [
        "gathered_conv2d",
        "split_epilogue",
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed_batches(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    counts = [1, 2, 0, 1] * 6  # more runs with images than a launch holds
    x = torch.randn(sum(counts), 264, 3, 4, generator=generator).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(40, 264, 3, 3, generator=generator).div(40).to(dtype)
    lists = [torch.arange(8 * (k % 5), 256 - 4 * (k - k % 2), dtype=torch.int32) for k in range(len(counts))]
    device.set_device(100_000)
    with cut(times=2), bk.use_backend("cuda"):
        y = torch.ops.bap_kernels._gathered_conv2d_mixed(x, weight, None, lists, counts, [1, 1], [1] * 4, [1, 1])
    for part, kept, source in zip(y.split(counts), lists, x.split(counts), strict=True):
        exact = torch.nn.functional.conv2d(source[:, kept].double(), weight[:, kept].double(), padding=1)
        torch.testing.assert_close(part.double(), exact, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_do_not_vary(dtype: torch.dtype) -> None:
    sample = make_tensors(LONG.but(dtype=dtype))
    results = []
    for seed in range(3):
        device.library().set_options(seed)
        with cut():
            results.append(run(sample, "cuda"))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_what_is_not_cut() -> None:
    with device.kernels() as names:
        for case in (
            LONG.but(in_channels=64, dtype=torch.float16),  # 9 steps
            LONG.but(batch=0),
            LONG.but(kernel=(1, 1), padding=(0,) * 4, in_channels=1096, size=(4, 8), layout="contiguous"),  # planes
        ):
            run(make_tensors(case), "cuda")
        # Two tiles are half of four SMs.
        device.set_device(4)
        run(make_tensors(LONG), "cuda")
    assert "split_epilogue" not in names
    assert names.count("gathered_conv2d") == 2


# 99 pixels and 136 columns: two tiles of WGMMA, of 27 steps.
WARPGROUPS = LONG.but(out_channels=136, size=(9, 11))


@pytest.mark.arch(90)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kernel", [(3, 3), (3, 2)])
def test_warpgroups(kernel: tuple[int, int], dtype: torch.dtype) -> None:
    device.set_device(9)
    case = WARPGROUPS.but(dtype=dtype, kernel=kernel, in_channels=200)
    runs(case, "warpgroup_conv2d")
    runs(case.but(out_channels=300, batch=2, stride=(2, 1), dilation=(2, 1), padding=(2, 0, 1, 3)), "warpgroup_conv2d")
    with cut("warpgroup_conv2d"):
        assert check_fused(case, ("out_scale", "out_shift", "residual", "out_relu"), "cuda", dual_store="odd")
    with device.kernels() as names:
        assert check_backward(case.but(in_channels=136, out_channels=200), "cuda", "channels_last")
    assert ["warpgroup_conv2d", "split_epilogue"] in [names[i : i + 2] for i in range(len(names))]


@pytest.mark.arch(90)
def test_warpgroups_of_mixed_batches() -> None:
    device.set_device(9)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 200, 9, 9, generator=generator).bfloat16().contiguous(memory_format=torch.channels_last)
    weight = torch.randn(136, 200, 3, 3, generator=generator).div(25).bfloat16()
    lists = [torch.arange(192, dtype=torch.int32), index_list("null", 200, random.Random(0))]
    with cut("warpgroup_conv2d"), bk.use_backend("cuda"):
        y = torch.ops.bap_kernels._gathered_conv2d_mixed(x, weight, None, lists, [2, 1], [1, 1], [1] * 4, [1, 1])
    for part, kept, source in zip(y.split([2, 1]), (list(range(192)), list(range(200))), x.split([2, 1]), strict=True):
        exact = torch.nn.functional.conv2d(source[:, kept].double(), weight[:, kept].double(), padding=1)
        torch.testing.assert_close(part.double(), exact, rtol=2e-2, atol=2e-2)
