"""What only a GPU can say of the CUDA C++ backend: graphs, streams, threads of the backward, repeat runs, Triton."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import bap_kernels
from bap_kernels import _C, reference
from bap_kernels.testing import Case, Sample, assert_close, check_backward, check_forward, make_tensors, run
from bap_kernels.testing_switched import check_switched, check_switched_backward

pytestmark = pytest.mark.gpu

BASE = Case(in_channels=64, out_channels=48, size=(14, 16), layout="channels_last")
POINTWISE = BASE.but(kernel=(1, 1), padding=(0, 0, 0, 0), layout="contiguous")
WIDE = Case(batch=3, in_channels=256, out_channels=200, size=(28, 24), layout="channels_last", bias=False)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
op = torch.ops.bap_kernels.gathered_conv2d


@pytest.fixture(autouse=True)
def _named_cuda() -> Iterator[None]:
    reason = _C.why_not("cuda")
    if reason is not None:
        pytest.skip(f"backend cuda: {reason}")
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    with bap_kernels.use_backend("cuda"):
        yield
    torch.backends.cudnn.allow_tf32 = before


def blocked(b: int = 16, case: Case = BASE) -> Sample:
    sample = make_tensors(case)
    channels = range(case.in_channels)
    sample.in_index = torch.tensor([c for c in channels if c // b % 2], dtype=torch.int32)
    return sample


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("b", [8, 16, 32])
def test_blocks_on_cuda(b: int, dtype: torch.dtype) -> None:
    sample = blocked(b, BASE.but(dtype=dtype, bias=False))
    assert_close(op(*sample.to("cuda").args), reference.gathered_conv2d(*sample.args), dtype, sample.depth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)])
def test_large_tiles_on_cuda(kernel: tuple[int, int], layout: str, dtype: torch.dtype) -> None:
    """Tensors of many tiles, against ATen on the CPU in float64."""
    padding = (kernel[0] // 2,) * 4
    case = WIDE.but(kernel=kernel, padding=padding, layout=layout, dtype=dtype, batch=16)
    sample = make_tensors(case)
    expected = reference.conv_on_selected(*sample.args)
    assert_close(op(*sample.to("cuda").args), expected, dtype, sample.depth)


def test_tf32_on_cuda() -> None:
    sample = make_tensors(WIDE.but(in_list="null"))
    expected = reference.conv_on_selected(*sample.args)
    there = sample.to("cuda")
    full = (op(*there.args).cpu().double() - expected).abs().max()
    torch.backends.cudnn.allow_tf32 = True
    rounded = (op(*there.args).cpu().double() - expected).abs().max()
    assert full < 1e-3 < rounded < 6 * sample.depth**0.5 * 2**-11


def test_capture_on_cuda() -> None:
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


def test_other_streams_on_cuda() -> None:
    sample = make_tensors(POINTWISE).to("cuda")
    expected = op(*sample.args)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        y = op(*sample.args)
    side.synchronize()
    assert torch.equal(y, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_other_devices_on_cuda() -> None:
    sample = make_tensors(BASE)
    there = sample.to("cuda:1")
    y = op(*there.args)
    assert y.device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
    assert_close(y, reference.gathered_conv2d(*sample.args), torch.float32, sample.depth)


def test_lists_are_read_once_on_cuda() -> None:
    sample = make_tensors(BASE).to("cuda")
    op(*sample.args)
    torch.cuda.set_sync_debug_mode("error")
    try:
        op(*sample.args)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (2, 1)])
def test_gradients_on_cuda(stride: tuple[int, int], dtype: torch.dtype) -> None:
    for case in (BASE, POINTWISE):
        assert check_backward(case.but(stride=stride, dtype=dtype), "cuda", case.layout, "cuda")


@pytest.mark.parametrize("case", [BASE, POINTWISE, BASE.but(stride=(2, 2)), BASE.but(dtype=torch.bfloat16)])
def test_switches_on_cuda(case: Case) -> None:
    for off_gradient in (True, False):
        check_switched(case, "cuda", "cuda")
        check_switched_backward(case, "cuda", case.layout, off_gradient, "cuda", loops=False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeat_runs_are_equal_bit_for_bit_on_cuda(dtype: torch.dtype) -> None:
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [BASE, POINTWISE], ids=["3x3", "1x1"])
def test_agrees_with_triton_on_cuda(case: Case, dtype: torch.dtype) -> None:
    reason = _C.why_not("triton")
    if reason is not None:
        pytest.skip(f"backend triton: {reason}")
    sample = make_tensors(case.but(dtype=dtype)).to("cuda")
    cuda, triton = run(sample, "cuda"), run(sample, "triton")
    assert_close(cuda, triton.cpu().double(), dtype, sample.depth)


def test_small_cases_for_the_sanitizer_on_cuda() -> None:
    """A launch of every kind: what tools/gpu_report.py runs under compute-sanitizer."""
    for dtype in DTYPES:
        for case in (BASE, POINTWISE, BASE.but(layout="contiguous", in_channels=19, size=(7, 5))):
            assert check_forward(case.but(dtype=dtype), "cuda", "cuda")
        assert check_backward(BASE.but(dtype=dtype, stride=(2, 2)), "cuda", device="cuda")
    check_switched_backward(BASE, "cuda", "channels_last", True, "cuda", loops=False)
