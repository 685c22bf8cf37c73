"""Every kernel of the CUDA backend, as compiled, against the float64 loops."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
import torch

import bap_kernels as bk
from bap_kernels import reference
from bap_kernels.testing import (
    LISTS,
    Case,
    assert_close,
    check_backward,
    check_forward,
    check_fused,
    make_tensors,
    poison,
    random_case,
    run,
)
from bap_kernels.testing_switched import check_switched, check_switched_backward, make_switched, run_switched

BASE = Case(in_channels=40, out_channels=36, size=(5, 8))
POINTWISE = BASE.but(kernel=(1, 1), padding=(0, 0, 0, 0))
# More than one large tile, and not a whole number of them.
WIDE = Case(in_channels=136, out_channels=144, size=(11, 12), batch=1, in_list="all", out_list="null")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FLAGS = ("in_scale", "in_shift", "in_relu", "out_scale", "out_shift", "residual", "out_relu")
LARGE, SMALL = 1, 1_000_000  # SMs: few make large tiles
sample = pytest.mark.sample


@sample
@pytest.mark.parametrize("sm_count", [LARGE, SMALL])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward(dtype: torch.dtype, sm_count: int, device: Any) -> None:
    device.set_device(sm_count)
    for seed, layout in enumerate(("contiguous", "channels_last", "sliced")):
        device.set_options(seed)
        for case in (BASE, POINTWISE):
            assert check_forward(case.but(layout=layout, dtype=dtype), "cuda")
    assert {"halo_conv2d", "gathered_conv2d", "planar_conv2d", "channel_pack"} <= set(device.take_launches())


@sample
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward(dtype: torch.dtype, device: Any) -> None:
    device.set_options(1)
    for layout in ("contiguous", "channels_last"):
        assert check_backward(BASE.but(layout=layout, stride=(2, 1), dtype=dtype), "cuda", layout)
        assert check_backward(POINTWISE.but(layout=layout, dtype=dtype), "cuda", layout)
    assert {"weight_gradient", "sum_partials", "gathered_conv2d"} <= set(device.take_launches())


@sample
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_fused(layout: str, device: Any) -> None:
    for seed, case in enumerate((BASE, POINTWISE)):
        device.set_options(seed)
        check_fused(case.but(layout=layout, dtype=torch.float16), FLAGS, "cuda")


@sample
def test_switched(device: Any) -> None:
    device.set_options(2)
    for layout in ("contiguous", "channels_last"):
        case = BASE.but(dtype=torch.bfloat16, layout=layout)
        assert check_switched(case, "cuda")
        assert check_switched_backward(case, "cuda", loops=False)


@sample
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_mixed(layout: str, device: Any) -> None:
    counts, lists = (2, 1, 0, 3), ([*range(8, 16)], [*range(24, 32), *range(8)], [3], [*range(16, 40)])
    indices = [torch.tensor(each, dtype=torch.int32) for each in lists]
    for kernel, padding in (((1, 1), (0, 0, 0, 0)), ((3, 2), (1, 0, 1, 1))):
        x, weight = torch.randn(6, 40, 5, 8).bfloat16(), torch.randn(18, 40, *kernel).bfloat16()
        if layout == "channels_last":
            x = x.contiguous(memory_format=torch.channels_last)
        options = ((1, 1), padding, (1, 1))
        parts = zip(x.split(list(counts)), indices, strict=True)
        expected = torch.cat([reference.gathered_conv2d(part, weight, None, i, None, *options, 1) for part, i in parts])
        with bk.use_backend("cuda"):
            y = torch.ops.bap_kernels._gathered_conv2d_mixed(x, weight, None, indices, counts, *options)
        assert_close(y, expected, torch.bfloat16, 40 * 6)


@sample
@pytest.mark.arch(90)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_warpgroups(dtype: torch.dtype, device: Any) -> None:
    for seed, (columns, kernel) in enumerate(((144, (3, 3)), (256, (1, 1)))):
        device.set_options(seed)
        case = WIDE.but(dtype=dtype, layout="channels_last", in_list="null", out_channels=columns, kernel=kernel)
        assert check_forward(case.but(padding=(kernel[0] // 2,) * 4), "cuda")
    assert set(device.take_launches()) == {"warpgroup_conv2d"}


@pytest.mark.arch(90)
@pytest.mark.parametrize("seed", range(6))
def test_warpgroups_of_every_kind(seed: int, device: Any) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        for columns, kernel, stride, dilation in (
            *((70, (3, 2), (2, 1), (1, 1)), (160, (1, 1), (2, 2), (1, 1))),
            *((256, (2, 3), (1, 1), (2, 1)), (300, (1, 1), (1, 1), (1, 1))),
        ):
            device.set_options(seed, truncate=seed % 2 == 1)
            case = WIDE.but(dtype=dtype, layout="channels_last", in_list="null", kernel=kernel, stride=stride)
            case = case.but(out_channels=columns, dilation=dilation, padding=(1, 0, 2, 1), batch=2, seed=seed)
            assert check_forward(case, "cuda")
            assert check_backward(case.but(stride=(1, 1)), "cuda", "channels_last")
    assert "warpgroup_conv2d" in device.take_launches()


@pytest.mark.parametrize("sm_count", [LARGE, SMALL])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)])
def test_several_tiles(kernel: tuple[int, int], layout: str, dtype: torch.dtype, sm_count: int, device: Any) -> None:
    device.set_device(sm_count)
    device.set_options(3)
    padding = (kernel[0] // 2,) * 4
    assert check_forward(WIDE.but(kernel=kernel, padding=padding, layout=layout, dtype=dtype), "cuda")
    assert check_backward(WIDE.but(kernel=kernel, padding=padding, layout=layout, dtype=dtype), "cuda", layout)


@pytest.mark.parametrize("sm_count", [LARGE, SMALL])
@pytest.mark.parametrize("kind", LISTS)
def test_lists(kind: str, sm_count: int, device: Any) -> None:
    device.set_device(sm_count)
    for layout in ("contiguous", "channels_last"):
        for case in (BASE, POINTWISE):
            listed = case.but(in_list=kind, out_list=kind, layout=layout, dtype=torch.bfloat16)
            assert check_forward(listed, "cuda")
            assert check_backward(listed, "cuda", layout)


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("b", [8, 16, 32])
def test_blocks(b: int, dtype: torch.dtype, kernel: tuple[int, int], device: Any) -> None:
    device.set_options(b)
    case = BASE.but(in_channels=192, kernel=kernel, layout="channels_last", dtype=dtype, in_list="null")
    tensors = make_tensors(case)
    blocks = random.Random(b).sample(range(192 // b), 192 // b - 2)
    tensors.in_index = torch.tensor([b * block + c for block in blocks for c in range(b)], dtype=torch.int32)
    poison(tensors)
    assert_close(run(tensors, "cuda"), reference.gathered_conv2d(*tensors.args), dtype, tensors.depth)


@pytest.mark.parametrize("seed", range(40))
def test_random_cases(seed: int, device: Any) -> None:
    rng = random.Random(seed)
    device.set_device(rng.choice((LARGE, SMALL)))
    device.set_options(seed, truncate=seed % 3 == 0)
    case = random_case(rng)
    check_forward(case, "cuda")
    check_backward(case, "cuda")
    check_switched(case, "cuda")


@pytest.mark.parametrize("kernel", [(1, 31), (31, 1), (16, 16)])
def test_as_many_taps_as_there_are_bits(kernel: tuple[int, int]) -> None:
    top, left = kernel[0] // 2, kernel[1] // 2
    padding = (top, kernel[0] - 1 - top, left, kernel[1] - 1 - left)
    case = Case(
        in_channels=16, out_channels=8, size=(6, 7), batch=1, kernel=kernel, padding=padding, layout="channels_last",
        in_list="null", out_list="null", dtype=torch.float16,
    )  # fmt: skip
    assert check_forward(case, "cuda")
    assert check_backward(case, "cuda", "channels_last")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("size", "strides"), [((1, 1), (37, 1, 37, 37)), ((5, 1), (80, 1, 16, 7)), ((1, 4), (64, 1, 3, 16))]
)
def test_an_axis_of_one_place_may_have_any_stride(
    size: tuple[int, int], strides: tuple[int, ...], dtype: torch.dtype, device: Any
) -> None:
    # Copies of padding have an address as well, which has to be aligned.
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(200, generator=generator).to(dtype).as_strided((1, 16, *size), strides)
    weight = torch.randn(24, 16, 3, 3, generator=generator).to(dtype)
    options = ((1, 1), (1, 1, 1, 1), (1, 1), 1)
    device.take_launches()
    with bk.use_backend("cuda"):
        y = torch.ops.bap_kernels.gathered_conv2d(x, weight, None, None, None, *options)
        grad = torch.randn(y.shape, generator=generator).to(dtype).contiguous(memory_format=torch.channels_last)
        got = torch.ops.bap_kernels.gathered_conv2d_backward(grad, x, weight, None, None, *options, (True, True, False))
    assert_close(y, reference.gathered_conv2d(x, weight, None, None, None, *options), dtype, 16 * 9)
    expected = reference.gathered_conv2d_backward(grad, x, weight, None, None, *options)
    for one, other, depth in zip(got[:2], expected[:2], (24 * 9, size[0] * size[1]), strict=True):
        assert_close(one, other, dtype, depth)
    assert "channel_pack" not in device.take_launches()


def test_every_instance_is_launched(device: Any) -> None:
    # By what nvcc compiled for this architecture, not by a list that someone keeps.
    seen = set()
    planes = WIDE.but(size=(8, 17), kernel=(1, 1), padding=(0, 0, 0, 0), in_list="null")
    rows = planes.but(layout="channels_last", size=(11, 12))
    cases = [
        planes,
        rows,
        rows.but(out_channels=24),
        rows.but(out_channels=256, in_list="odd"),
        rows.but(out_channels=120),
        WIDE.but(in_channels=24, layout="channels_last", size=(11, 12), in_list="null"),
        WIDE.but(in_channels=256, out_channels=24, layout="channels_last", size=(11, 12), in_list="null"),
    ]
    cases += [WIDE.but(in_list="odd", size=size) for size in ((8, 17), (32, 32))]
    for dtype in DTYPES:
        for sm_count in (LARGE, SMALL):
            device.set_device(sm_count)
            for case in cases:
                tensors = make_tensors(case.but(dtype=dtype))
                tensors.input.requires_grad_()
                tensors.weight.requires_grad_()
                run(tensors, "cuda").float().sum().backward()
                assert tensors.input.grad.isfinite().all()
                assert tensors.weight.grad.isfinite().all()
            switched = make_switched(rows.but(dtype=dtype, in_list="odd"))
            for tensor in switched.tensors:
                tensor.requires_grad_()
            run_switched(switched, "cuda").float().sum().backward()
            seen.update(device.take_mangled())
    # One architecture has WGMMA; there it takes every forward and weight gradient that would have the large tile in 16
    # bits. Names stand behind their lengths.
    large = "(gathered_conv2d_kernel.*Lb0E|22weight_gradient_kernel)"
    mma = rf"(?=.*MathModeE[01].*Li128ELi128E){large}"
    others = "warpgroup|weight_tiles" if device.arch == 80 else mma
    wanted = {name for name in device.kernel_names() if not re.search(others, name)}
    missing = [re.sub(r"NS_|11bap_kernels", "", name) for name in sorted(wanted - seen)]
    assert not missing, "\n".join(missing)
    assert len([name for name in device.kernel_names() if "MathMode" in name]) <= 48
