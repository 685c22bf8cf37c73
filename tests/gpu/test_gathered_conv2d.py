"""The ops on a CUDA device, against the references on the CPU."""

from __future__ import annotations

import itertools
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
    check_backward,
    check_forward,
    check_fused,
    make_tensors,
    poison,
    random_case,
)

pytestmark = pytest.mark.gpu

BASE = Case(in_channels=40, out_channels=36, size=(14, 15))
FLAGS = ("in_scale", "in_shift", "in_relu", "out_scale", "out_shift", "residual", "out_relu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


BACKENDS = ("auto", "aten", "triton", "cuda")
KERNELS = [
    (backend, kernel, layout)
    for backend, kernel, layout in itertools.product(BACKENDS, ((1, 1), (3, 3), (3, 2), (5, 5)), LAYOUTS)
    # Of Triton each case is a compilation of seconds, and the interpreter has the others.
    if backend != "triton" or (kernel != (5, 5) and layout in ("contiguous", "channels_last", "sliced"))
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("gpu_backend", "kernel", "layout"), KERNELS, indirect=["gpu_backend"])
def test_kernels_and_layouts(gpu_backend: str, kernel: tuple[int, int], layout: str, dtype: torch.dtype) -> None:
    padding = (kernel[0] // 2, kernel[0] // 2, kernel[1] // 2, kernel[1] // 2)
    for stride in ((1, 1), (2, 1)):
        case = BASE.but(kernel=kernel, padding=padding, stride=stride, layout=layout, dtype=dtype)
        check_forward(case, gpu_backend, "cuda")


@pytest.mark.parametrize("out_list", LISTS)
@pytest.mark.parametrize("in_list", LISTS)
def test_lists(in_list: str, out_list: str, gpu_backend: str) -> None:
    for bias in (True, False):
        check_forward(BASE.but(in_list=in_list, out_list=out_list, bias=bias), gpu_backend, "cuda")


@pytest.mark.parametrize("batch", [0, 1, 2, 33])
def test_batches(batch: int, gpu_backend: str) -> None:
    check_forward(BASE.but(batch=batch, padding=(2, 0, 1, 3), dilation=(2, 1)), gpu_backend, "cuda")
    check_forward(BASE.but(batch=batch, depthwise=True), gpu_backend, "cuda")


@pytest.mark.parametrize("chunk", range(6))
def test_random_cases(chunk: int, gpu_backend: str) -> None:
    # Triton compiles for each of them.
    for seed in range(50 * chunk, 50 * chunk + (3 if gpu_backend == "triton" else 50)):
        case = random_case(random.Random(seed))
        try:
            check_forward(case, gpu_backend, "cuda")
            check_backward(case, gpu_backend, device="cuda")
        except Exception as error:
            raise AssertionError(f"seed {seed}, backend {gpu_backend}: {case}") from error


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_fused(layout: str, dtype: torch.dtype, gpu_backend: str) -> None:
    for flags in (FLAGS, *[(flag,) for flag in FLAGS]):
        check_fused(BASE.but(layout=layout, dtype=dtype), flags, gpu_backend, device="cuda")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_unlisted_channels_never_reach_the_output(layout: str, value: float, gpu_backend: str) -> None:
    case = BASE.but(layout=layout)
    expected = reference.gathered_conv2d(*make_tensors(case).args)
    sample = poison(make_tensors(case), value).to("cuda")
    with bap_kernels.use_backend(gpu_backend):
        for _ in range(2):
            y = torch.ops.bap_kernels.gathered_conv2d(*sample.args)
            assert_close(y, expected, case.dtype, sample.depth)


@pytest.mark.parametrize("grad_layout", ["contiguous", "channels_last", "sliced", "expanded"])
def test_gradients(grad_layout: str, gpu_backend: str) -> None:
    for case in (BASE, BASE.but(layout="channels_last"), BASE.but(depthwise=True), BASE.but(dtype=torch.bfloat16)):
        check_backward(case, gpu_backend, grad_layout, "cuda")


def test_results_do_not_vary(gpu_backend: str) -> None:
    sample = make_tensors(BASE).to("cuda")
    with bap_kernels.use_backend(gpu_backend):
        first = torch.ops.bap_kernels.gathered_conv2d(*sample.args)
        for _ in range(5):
            assert torch.equal(torch.ops.bap_kernels.gathered_conv2d(*sample.args), first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_obeys_the_users_dtype(dtype: torch.dtype) -> None:
    sample = make_tensors(BASE).to("cuda")
    with torch.autocast("cuda", dtype):
        y = torch.ops.bap_kernels.gathered_conv2d(*sample.args)
    assert y.dtype == dtype


@pytest.mark.parametrize("argument", ["weight", "bias", "in_index", "out_index"])
def test_other_device(argument: str) -> None:
    sample = make_tensors(BASE).to("cuda")
    setattr(sample, argument, getattr(sample, argument).cpu())
    with pytest.raises(ValueError, match=rf"expected `{argument}` to be on the input's device cuda:0, got cpu"):
        torch.ops.bap_kernels.gathered_conv2d(*sample.args)


def test_dispatch_takes_the_device_of_the_tensors() -> None:
    sample = make_tensors(BASE)
    on_cpu = torch.ops.bap_kernels.gathered_conv2d(*sample.args)
    on_gpu = torch.ops.bap_kernels.gathered_conv2d(*sample.to("cuda").args)
    assert on_gpu.is_cuda
    assert_close(on_gpu, on_cpu.double(), torch.float32, sample.depth)
