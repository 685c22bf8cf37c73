"""What only a GPU can say of a backend with kernels of its own: graphs, streams, devices, repeat runs, memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import bap_kernels
from bap_kernels import reference
from bap_kernels.testing import Case, Sample, assert_close, check_backward, make_tensors
from bap_kernels.testing_switched import check_switched, check_switched_backward

# The backend is in each test's name: tools/gpu_report.py runs them apart.
pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("gpu_backend", ["triton", "cuda"], indirect=True)]

BASE = Case(in_channels=64, out_channels=48, size=(14, 16), layout="channels_last")
POINTWISE = BASE.but(kernel=(1, 1), padding=(0, 0, 0, 0), layout="contiguous")
WIDE = Case(batch=3, in_channels=256, out_channels=200, size=(28, 24), layout="channels_last", bias=False)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
op = torch.ops.bap_kernels.gathered_conv2d


@pytest.fixture(autouse=True)
def _named(gpu_backend: str) -> Iterator[None]:
    with bap_kernels.use_backend(gpu_backend):
        yield


def blocked(b: int = 16, case: Case = BASE) -> Sample:
    sample = make_tensors(case)
    channels = range(case.in_channels)
    sample.in_index = torch.tensor([c for c in channels if c // b % 2], dtype=torch.int32)
    return sample


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("b", [8, 16, 32])
def test_blocks(b: int, dtype: torch.dtype) -> None:
    sample = blocked(b, BASE.but(dtype=dtype, bias=False))
    assert_close(op(*sample.to("cuda").args), reference.gathered_conv2d(*sample.args), dtype, sample.depth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)])
def test_large_tiles(kernel: tuple[int, int], layout: str, dtype: torch.dtype) -> None:
    """Tensors of many tiles, against ATen on the CPU in float64."""
    padding = (kernel[0] // 2,) * 4
    case = WIDE.but(kernel=kernel, padding=padding, layout=layout, dtype=dtype, batch=16)
    sample = make_tensors(case)
    expected = reference.conv_on_selected(*sample.args)
    assert_close(op(*sample.to("cuda").args), expected, dtype, sample.depth)


def test_tf32() -> None:
    sample = make_tensors(WIDE.but(in_list="null"))
    expected = reference.conv_on_selected(*sample.args)
    there = sample.to("cuda")
    full = (op(*there.args).cpu().double() - expected).abs().max()
    torch.backends.cudnn.allow_tf32 = True
    rounded = (op(*there.args).cpu().double() - expected).abs().max()
    # Triton leaves the rounding to the instruction, which cuts: twice the error of rounding, and all to one side.
    assert full < 1e-3 < rounded < 12 * sample.depth**0.5 * 2**-11


def test_capture() -> None:
    for sample in (blocked(), make_tensors(BASE), make_tensors(POINTWISE)):
        there = sample.to("cuda")
        with torch.no_grad():
            for _ in range(2):
                expected = op(*there.args, True)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = op(*there.args, True)
        y.zero_()
        graph.replay()
        assert torch.equal(y, expected)
        there.input.neg_()
        graph.replay()
        assert torch.equal(y, op(*there.args, True))


def test_other_streams() -> None:
    sample = make_tensors(POINTWISE).to("cuda")
    expected = op(*sample.args)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        y = op(*sample.args)
    side.synchronize()
    assert torch.equal(y, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_other_devices() -> None:
    sample = make_tensors(BASE)
    there = sample.to("cuda:1")
    y = op(*there.args)
    assert y.device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
    assert_close(y, reference.gathered_conv2d(*sample.args), torch.float32, sample.depth)


def test_lists_are_read_once() -> None:
    sample = make_tensors(BASE).to("cuda")
    op(*sample.args)
    torch.cuda.set_sync_debug_mode("error")
    try:
        op(*sample.args)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (2, 1)])
def test_gradients(stride: tuple[int, int], dtype: torch.dtype, gpu_backend: str) -> None:
    for case in (BASE, POINTWISE):
        assert check_backward(case.but(stride=stride, dtype=dtype), gpu_backend, case.layout, "cuda")


@pytest.mark.parametrize("case", [BASE, POINTWISE, BASE.but(stride=(2, 2)), BASE.but(dtype=torch.bfloat16)])
def test_switches(case: Case, gpu_backend: str) -> None:
    for off_gradient in (True, False):
        check_switched(case, gpu_backend, "cuda")
        check_switched_backward(case, gpu_backend, case.layout, off_gradient, "cuda", loops=False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeat_runs_are_equal_bit_for_bit(dtype: torch.dtype) -> None:
    sample = make_tensors(WIDE.but(dtype=dtype)).to("cuda")
    sample.input.requires_grad_()
    sample.weight.requires_grad_()
    y = op(*sample.args)
    grad = torch.randn_like(y)
    first = torch.autograd.grad(y, (sample.input, sample.weight), grad)
    for _ in range(5):
        again = op(*sample.args)
        assert torch.equal(again, y)
        for one, other in zip(torch.autograd.grad(again, (sample.input, sample.weight), grad), first, strict=True):
            assert torch.equal(one, other)


def test_memory_of_a_call() -> None:
    """A planar 1x1 convolution allocates its result and its packed weight, nothing of the size of its input."""
    sample = make_tensors(POINTWISE.but(batch=32, size=(28, 28), in_channels=256, out_channels=64)).to("cuda")
    op(*sample.args)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = op(*sample.args)
    assert torch.cuda.max_memory_allocated() - before < y.nbytes + sample.input.nbytes // 4
