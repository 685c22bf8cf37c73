"""The kernel of warpgroups (wgmma, compute capability 9.0a).

Every case says that the kernel took it: the other kernel gives the same results.
"""

from __future__ import annotations

import random

import pytest
import torch

import bap_kernels
from bap_kernels import reference
from bap_kernels.testing import Case, Sample, assert_close, check_fused, make_tensors, poison, run
from bap_kernels.testing_switched import make_switched, poison_switched, run_switched
from tests.ptx.cuda import device

# 99 pixels: less than a tile, and rows that no pixel has. Columns of one tile and a bit.
BASE = Case(
    in_channels=72, out_channels=136, size=(9, 11), batch=1, layout="channels_last", in_list="null", out_list="null"
)
WORDS = (torch.float16, torch.bfloat16)


pytestmark = pytest.mark.arch(90)


def launches() -> int:
    """Launches of the kernel in this test so far."""
    return device.launched("warpgroup_conv2d")


def runs(case: Case, sample: Sample | None = None) -> None:
    sample = make_tensors(case) if sample is None else sample
    expected = reference.gathered_conv2d(*sample.args)
    with device.kernels() as names:
        y = run(poison(sample), "cuda")
    assert_close(y, expected, case.dtype, sample.depth)
    assert names.count("warpgroup_conv2d") == 1


@pytest.mark.parametrize("dtype", WORDS)
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (3, 2)])
@pytest.mark.parametrize("columns", [72, 136, 256])
def test_kernels_dtypes_and_tiles(columns: int, kernel: tuple[int, int], dtype: torch.dtype) -> None:
    padding = (kernel[0] // 2, kernel[0] // 2, kernel[1] // 2, kernel[1] // 2)
    runs(BASE.but(kernel=kernel, padding=padding, dtype=dtype, out_channels=columns))


# One step, fewer steps than either tile has stages, and stages that are filled more than twice.
@pytest.mark.parametrize("channels", [8, 136, 1096])
@pytest.mark.parametrize("columns", [128, 256])
def test_depths(columns: int, channels: int) -> None:
    pointwise = BASE.but(kernel=(1, 1), padding=(0,) * 4, dtype=torch.bfloat16)
    runs(pointwise.but(in_channels=channels, out_channels=columns))


@pytest.mark.parametrize("b", [8, 16, 32])
@pytest.mark.parametrize("dtype", WORDS)
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)])
def test_blocks(kernel: tuple[int, int], dtype: torch.dtype, b: int) -> None:
    case = BASE.but(in_channels=192, kernel=kernel, padding=(kernel[0] // 2,) * 4, dtype=dtype)
    sample = make_tensors(case)
    # Out of order, so that no block follows from the one before.
    blocks = random.Random(b).sample(range(192 // b), 192 // b - 2)
    sample.in_index = torch.tensor([b * block + c for block in blocks for c in range(b)], dtype=torch.int32)
    runs(case, sample)


@pytest.mark.parametrize("dtype", WORDS)
def test_strides_padding_dilation_and_several_tiles(dtype: torch.dtype) -> None:
    base = BASE.but(dtype=dtype, size=(17, 19), batch=2)
    runs(base)
    runs(base.but(stride=(2, 1), padding=(2, 0, 1, 3), dilation=(2, 1)))
    runs(base.but(stride=(2, 1), out_list="shuffled", out_channels=150))
    runs(base.but(kernel=(5, 3), padding=(4, 4, 2, 2), out_channels=256))


@pytest.mark.parametrize("residual", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("columns", [136, 256])
def test_everything_fused(columns: int, residual: str) -> None:
    case = BASE.but(kernel=(1, 1), padding=(0,) * 4, dtype=torch.bfloat16, out_channels=columns)
    before = launches()
    flags = ("out_scale", "out_shift", "residual", "out_relu")
    assert check_fused(case, flags, "cuda", residual_layout=residual, vector_dtype=torch.float32)
    assert launches() == before + 1


@pytest.mark.parametrize("dtype", WORDS)
@pytest.mark.parametrize("stride", [(1, 1), (2, 2)])
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_gradients_of_the_input(layout: str, stride: tuple[int, int], dtype: torch.dtype) -> None:
    # Planes are spread from what the kernel computes in NHWC.
    case = BASE.but(in_channels=136, out_channels=72, size=(19, 20), stride=stride, dtype=dtype, layout=layout)
    sample = make_tensors(case)
    grad = torch.randn(sample.output_shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    grad = grad.contiguous(memory_format=torch.channels_last)
    for channels in (None, [c for c in range(136) if c // 8 % 3 != 1]):
        sample.in_index = None if channels is None else torch.tensor(channels, dtype=torch.int32)
        before = launches()
        with bap_kernels.use_backend("cuda"):
            dx, _, _ = torch.ops.bap_kernels.gathered_conv2d_backward(
                grad, *sample.args[:2], *sample.args[3:], (True, False, False)
            )
        assert launches() == before + 1
        x = sample.input.double().requires_grad_()
        kept = list(range(136)) if channels is None else channels
        y = torch.nn.functional.conv2d(x[:, kept], sample.weight[:, kept].double(), stride=stride, padding=1)
        (expected,) = torch.autograd.grad(y, x, grad.double())
        assert_close(dx, expected, dtype, 72 * 9)
        assert bool((dx[:, [c for c in range(136) if c not in kept]] == 0).all())


# Channels and filters that end within a tile of weights, in chunks of 16 bytes and not, and tiles of both widths.
@pytest.mark.parametrize("dtype", WORDS)
@pytest.mark.parametrize("channels", [range(1, 194, 2), range(0, 194, 3), range(7, 8)])
@pytest.mark.parametrize("filters", [range(259, 129, -1), range(259, 3, -1)])
def test_weights_of_lists(filters: range, channels: range, dtype: torch.dtype) -> None:
    case = BASE.but(in_channels=194, out_channels=260, kernel=(2, 1), padding=(1, 0, 0, 0), dtype=dtype)
    sample = make_tensors(case)
    sample.in_index = torch.tensor(list(channels), dtype=torch.int32)
    sample.out_index = torch.tensor(list(filters), dtype=torch.int32)
    # Its elements lie side by side along no axis that the packing could take for granted.
    sample.weight = sample.weight.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2)
    runs(case, sample)


def test_weights_are_laid_out_once_for_each_list() -> None:
    sample = make_tensors(BASE.but(dtype=torch.float16))

    def layings_out() -> int:
        return sum("weight_tiles_kernel" in name for name in device.library().take_mangled())

    bap_kernels.clear_packed_cache()
    layings_out()
    first = run(sample, "cuda", cache_packed=True)
    assert torch.equal(run(sample, "cuda", cache_packed=True), first)
    assert layings_out() == 1
    sample.in_index = torch.arange(64, dtype=torch.int32)
    other = run(sample, "cuda", cache_packed=True)
    assert_close(other, reference.gathered_conv2d(*sample.args), torch.float16, sample.depth)
    assert layings_out() == 1
    sample.weight.mul_(2)
    doubled = run(sample, "cuda", cache_packed=True)
    assert_close(doubled, reference.gathered_conv2d(*sample.args), torch.float16, sample.depth)
    assert layings_out() == 1
    run(sample, "cuda")
    assert layings_out() == 1


@pytest.mark.parametrize("dtype", WORDS)
def test_weights_of_channels_that_are_off_may_be_anything(dtype: torch.dtype) -> None:
    # A count on the device: 36 of 72 channels, which ends within a tile of weights.
    sample = make_switched(BASE.but(dtype=dtype, in_list="odd"))
    expected = reference.switched_conv2d(*sample.args)
    before = launches()
    y = run_switched(poison_switched(sample), "cuda")
    assert launches() == before + 1
    assert_close(y, expected, dtype, sample.depth)


def test_infinity_and_nan_in_listed_channels() -> None:
    sample = make_tensors(BASE.but(kernel=(1, 1), padding=(0,) * 4, dtype=torch.float16, out_channels=128))
    sample.input[0, 3, 2, 2] = torch.inf
    sample.input[0, 4, 7, 1] = torch.nan
    before = launches()
    y = run(sample, "cuda")
    assert launches() == before + 1
    assert bool(y[0, :, 2, 2].isinf().all())
    assert bool(y[0, :, 7, 1].isnan().all())
    assert int(y.isfinite().logical_not().sum()) == 2 * y.shape[1]


def test_mixed_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 72, 9, 9, generator=generator).to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(136, 72, 3, 3, generator=generator).div(25).to(torch.bfloat16)
    lists = [torch.arange(64, dtype=torch.int32), torch.arange(8, 40, dtype=torch.int32)]
    before = launches()
    with bap_kernels.use_backend("cuda"):
        y = torch.ops.bap_kernels._gathered_conv2d_mixed(x, weight, None, lists, [2, 1], [1, 1], [1] * 4, [1, 1])
    assert launches() == before + 1
    for part, kept, source in zip(y.split([2, 1]), lists, x.split([2, 1]), strict=True):
        exact = torch.nn.functional.conv2d(source[:, kept].double(), weight[:, kept].double(), padding=1)
        torch.testing.assert_close(part.double(), exact, rtol=2e-2, atol=2e-2)


def test_what_is_left_to_the_other_kernels() -> None:
    before = launches()
    small = BASE.but(dtype=torch.bfloat16)
    for case in (
        BASE,  # float32
        small.but(out_channels=64),
        small.but(size=(7, 7)),
        small.but(layout="contiguous"),  # a halo
        small.but(kernel=(1, 1), padding=(0,) * 4, layout="contiguous", size=(16, 16)),  # planes
    ):
        run(make_tensors(case), "cuda")
    device.set_device(sm_count=132)
    run(make_tensors(small), "cuda")
    device.set_device(arch=80)
    run(make_tensors(small), "cuda")
    assert launches() == before
