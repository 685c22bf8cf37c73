"""The weight's gradient by WGMMA (compute capability 9.0a).

Every case says that the kernel took it: the other kernel gives the same results.
"""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

import bap_kernels as bk
from bap_kernels import reference
from bap_kernels.testing import Case, Sample, assert_close, make_tensors, poison
from bap_kernels.testing_switched import check_switched_backward
from tests.ptx.cuda import device

# 72 filters of one tile, 136 channels of two; 247 pixels an image, so that stages are filled more than once.
BASE = Case(
    in_channels=136, out_channels=72, size=(13, 19), batch=2, layout="channels_last", in_list="null", out_list="null"
)
POINTWISE = BASE.but(kernel=(1, 1), padding=(0, 0, 0, 0))
WORDS = (torch.float16, torch.bfloat16)

pytestmark = pytest.mark.arch(90)


def gradient(sample: Sample, grad: Tensor) -> Tensor:
    with bk.use_backend("cuda"):
        _, dw, _ = torch.ops.bap_kernels.gathered_conv2d_backward(
            grad, *sample.args[:2], *sample.args[3:], (False, True, False)
        )
    return dw


def grad_of(sample: Sample) -> Tensor:
    grad = torch.randn(sample.output_shape, generator=torch.Generator().manual_seed(2)).to(sample.input.dtype)
    return grad.contiguous(memory_format=torch.channels_last)


def runs(case: Case, sample: Sample | None = None) -> None:
    sample = make_tensors(case) if sample is None else sample
    grad = grad_of(sample)
    weight = sample.weight.double().requires_grad_()
    y = reference.conv_on_selected(sample.input.double(), weight, None, *sample.args[3:])
    (expected,) = torch.autograd.grad(y, weight, grad.double())
    poison(sample)
    with device.kernels() as names:
        dw = gradient(sample, grad)
    assert_close(dw, expected, case.dtype, grad.shape[0] * grad.shape[2] * grad.shape[3])
    assert [name for name in names if "weight" in name] == ["warpgroup_weight_gradient"]


@pytest.mark.parametrize("dtype", WORDS)
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (3, 2)])
def test_kernels_and_dtypes(kernel: tuple[int, int], dtype: torch.dtype) -> None:
    padding = (kernel[0] // 2, kernel[0] // 2, kernel[1] // 2, kernel[1] // 2)
    runs(BASE.but(kernel=kernel, padding=padding, dtype=dtype))


@pytest.mark.parametrize("dtype", WORDS)
def test_strides_padding_dilation_and_several_tiles(dtype: torch.dtype) -> None:
    base = BASE.but(dtype=dtype, in_channels=264, out_channels=200)
    runs(base.but(kernel=(2, 1), stride=(2, 1), padding=(2, 0, 1, 3), dilation=(2, 1)))
    runs(POINTWISE.but(dtype=dtype, in_channels=264, out_channels=200, stride=(1, 3)))


# Less than one slice, one step and a bit, as many as stages and one more.
@pytest.mark.parametrize("size", [(1, 3), (5, 13), (16, 24), (16, 25)])
def test_depths(size: tuple[int, int]) -> None:
    runs(POINTWISE.but(size=size, batch=1, dtype=torch.bfloat16))


# Channels and filters that end within 16 bytes.
@pytest.mark.parametrize("dtype", WORDS)
@pytest.mark.parametrize(("channels", "filters"), [(65, 66), (129, 127), (133, 131)])
def test_ragged_channels(channels: int, filters: int, dtype: torch.dtype) -> None:
    runs(POINTWISE.but(in_channels=channels, out_channels=filters, dtype=dtype))


@pytest.mark.parametrize("b", [8, 16, 32])
@pytest.mark.parametrize("dtype", WORDS)
def test_blocks(dtype: torch.dtype, b: int) -> None:
    for case in (BASE.but(in_channels=256, dtype=dtype, size=(7, 9)), POINTWISE.but(in_channels=256, dtype=dtype)):
        sample = make_tensors(case)
        blocks = random.Random(b).sample(range(256 // b), 256 // b - 2)
        sample.in_index = torch.tensor([b * block + c for block in blocks for c in range(b)], dtype=torch.int32)
        runs(case, sample)


# Of 160 channels and 150 filters, more than 64 each.
def listed(kind: str, count: int, kept: int) -> Tensor | None:
    if kind == "null":
        return None
    channels = random.Random(kept).sample(range(count), count if kind == "all" else kept)
    return torch.tensor(channels if kind == "shuffled" else sorted(channels), dtype=torch.int32)


@pytest.mark.parametrize("kind", ["null", "odd", "all", "shuffled"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_lists(layout: str, kind: str) -> None:
    case = BASE.but(in_channels=160, out_channels=150, size=(7, 9), layout=layout, dtype=torch.float16)
    for kinds in ((kind, "null"), ("null", kind), (kind, kind)):
        sample = make_tensors(case)
        sample.in_index, sample.out_index = listed(kinds[0], 160, 101), listed(kinds[1], 150, 77)
        runs(case, sample)


@pytest.mark.parametrize("sm_count", [8, 1000])
def test_chunks_of_pixels(sm_count: int) -> None:
    device.set_device(sm_count)
    runs(BASE.but(dtype=torch.float16))


@pytest.mark.parametrize("kind", ["odd", "all", "one"])
def test_switches(kind: str) -> None:
    # How many channels are on stands on the device: tiles behind them are left alone.
    case = POINTWISE.but(in_channels=150, size=(5, 9), in_list=kind, dtype=torch.bfloat16)
    with device.kernels() as names:
        assert check_switched_backward(case, "cuda", "channels_last", loops=False)
    assert "warpgroup_weight_gradient" in names


def test_results_do_not_vary() -> None:
    device.set_device(64)
    sample = make_tensors(BASE.but(dtype=torch.bfloat16))
    grad, results = grad_of(sample), []
    for seed in range(3):
        device.library().set_options(seed)
        results.append(gradient(sample, grad))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_what_is_left_to_the_other_kernel() -> None:
    words = POINTWISE.but(dtype=torch.bfloat16, size=(3, 4))
    with device.kernels() as names:
        for case in (words.but(out_channels=64), words.but(in_channels=64), words.but(dtype=torch.float32)):
            sample = make_tensors(case)
            gradient(sample, grad_of(sample))
        device.set_device(arch=80)
        sample = make_tensors(words)
        gradient(sample, grad_of(sample))
    assert names.count("weight_gradient") == 4
    assert "warpgroup_weight_gradient" not in names
