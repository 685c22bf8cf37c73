"""What only a GPU can say of the Triton backend: graphs, streams, threads of the backward, lists read once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import bap_kernels
from bap_kernels import _C, reference
from bap_kernels.testing import Case, Sample, assert_close, make_tensors
from bap_kernels.testing_switched import check_switched, check_switched_backward

pytestmark = pytest.mark.gpu

BASE = Case(in_channels=64, out_channels=48, size=(14, 15), layout="channels_last")
POINTWISE = BASE.but(kernel=(1, 1), padding=(0, 0, 0, 0), layout="contiguous")
op = torch.ops.bap_kernels.gathered_conv2d


@pytest.fixture(autouse=True)
def _named_triton() -> Iterator[None]:
    reason = _C.why_not("triton")
    if reason is not None:
        pytest.skip(f"backend triton: {reason}")
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    with bap_kernels.use_backend("triton"):
        yield
    torch.backends.cudnn.allow_tf32 = before


def blocked(b: int = 16) -> Sample:
    sample = make_tensors(BASE)
    sample.in_index = torch.tensor([c for c in range(64) if c // b % 2], dtype=torch.int32)
    return sample


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("b", [8, 16, 32])
def test_blocks_on_triton(b: int, dtype: torch.dtype) -> None:
    sample = blocked(b)
    sample.input, sample.weight = sample.input.to(dtype), sample.weight.to(dtype)
    sample.bias = None
    expected = reference.gathered_conv2d(*sample.args)
    assert_close(op(*sample.to("cuda").args), expected, dtype, sample.depth)


def test_capture_on_triton() -> None:
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


def test_other_streams_on_triton() -> None:
    sample = make_tensors(POINTWISE).to("cuda")
    expected = op(*sample.args)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        y = op(*sample.args)
    side.synchronize()
    assert torch.equal(y, expected)


def test_the_backward_knows_the_backend_on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    from bap_kernels.triton import ops

    calls = []
    real = ops.gathered_conv2d_backward
    monkeypatch.setattr(ops, "gathered_conv2d_backward", lambda *args: calls.append(1) or real(*args))
    sample = make_tensors(BASE).to("cuda")
    sample.weight.requires_grad_()
    op(*sample.args).sum().backward()
    assert len(calls) == 1


def test_lists_are_read_once_on_triton() -> None:
    sample = make_tensors(BASE).to("cuda")
    op(*sample.args)
    torch.cuda.set_sync_debug_mode("error")
    try:
        op(*sample.args)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("case", [BASE, POINTWISE, BASE.but(stride=(2, 2)), BASE.but(dtype=torch.bfloat16)])
def test_switches_on_triton(case: Case) -> None:
    for off_gradient in (True, False):
        check_switched(case, "triton", "cuda")
        check_switched_backward(case, "triton", case.layout, off_gradient, "cuda", loops=False)


def test_memory_of_a_call_on_triton() -> None:
    """A planar 1x1 convolution allocates its result and its packed weight, nothing of the size of its input."""
    sample = make_tensors(POINTWISE.but(batch=32, size=(28, 28), in_channels=256, out_channels=64)).to("cuda")
    op(*sample.args)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = op(*sample.args)
    assert torch.cuda.max_memory_allocated() - before < y.nbytes + sample.input.nbytes // 4
