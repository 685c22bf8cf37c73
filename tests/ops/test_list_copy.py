"""Each call copies its lists before it checks them, so that writes of other threads have no effect in between."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch

import bap_kernels as bk
from bap_kernels import reference
from bap_kernels.testing import Case, assert_close, make_tensors, run

CASE = Case(1, 64, 48, (6, 7), in_list="odd", out_list="odd", seed=5)


def test_long_strided_and_empty_lists_are_copied(backend: str) -> None:
    # Copies reuse memory: lengths go down, then up.
    for channels in (300, 20, 7, 1000, 20):
        sample = make_tensors(Case(1, channels, channels, (3, 3), kernel=(1, 1), padding=(0, 0, 0, 0), seed=channels))
        expected = reference.conv_on_selected(*sample.args)
        assert_close(run(sample, backend), expected, sample.input.dtype, sample.depth)
        wide = torch.full((2 * len(sample.in_index),), -1, dtype=torch.int32)
        wide[::2] = sample.in_index
        sample.in_index = wide[::2]
        assert_close(run(sample, backend), expected, sample.input.dtype, sample.depth)
        sample.in_index = sample.in_index[:0]
        assert_close(run(sample, backend), reference.conv_on_selected(*sample.args), sample.input.dtype, 1)


def test_nested_calls_have_separate_list_copies(backend: str) -> None:
    sample = make_tensors(CASE)
    lists = [torch.arange(first, 64, 4, dtype=torch.int32) for first in range(4)]
    for _ in range(2):
        for index in lists:
            sample.in_index = index
            for cached in (False, True):
                y = run(sample, backend, cache_packed=cached)
                assert_close(y, reference.conv_on_selected(*sample.args), sample.input.dtype, sample.depth)


@pytest.fixture
def disturbed() -> Iterator[torch.Tensor]:
    """A list that another thread repeatedly overwrites with invalid values and restores."""
    index = torch.arange(0, 64, 2, dtype=torch.int32)
    good, bad = index.clone(), torch.full_like(index, 2**30)
    bad[::2] = -(2**30)
    stop = threading.Event()

    def disturb() -> None:
        while not stop.is_set():
            index.copy_(bad)
            index.copy_(good)

    thread = threading.Thread(target=disturb)
    thread.start()
    yield index
    stop.set()
    thread.join()


def _forward(index: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> None:
    bk.gathered_conv2d(x, w, None, index, index[:20])


def _kept(index: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> None:
    torch.ops.bap_kernels.gathered_conv2d(x, w, None, index, index, (1, 1), (0, 0, 0, 0), (1, 1), 1, True)


def _fused(index: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> None:
    rest = (None, None, False, None, None, None, True)
    torch.ops.bap_kernels._gathered_conv2d_fused(
        *(x[:, :32].contiguous(), w, None, None, index, (1, 1), (0, 0, 0, 0), (1, 1), 1, *rest), weight_index=index
    )


def _dual_store(index: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> None:
    rest = (None, None, False, None, None, None, True)
    torch.ops.bap_kernels._gathered_conv2d_fused(
        *(x, w, None, None, None, (1, 1), (0, 0, 0, 0), (1, 1), 1, *rest), dual_store_index=index
    )


def _backward(index: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> None:
    g = torch.ones(1, 32, 5, 5)
    torch.ops.bap_kernels.gathered_conv2d_backward(
        g, x, w, index, index, (1, 1), (0, 0, 0, 0), (1, 1), 1, (True, True, True)
    )


def _mixed(index: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> None:
    torch.ops.bap_kernels._gathered_conv2d_mixed(
        x.repeat(2, 1, 1, 1), w, None, [index, index], [1, 1], (1, 1), (0, 0, 0, 0), (1, 1)
    )


@pytest.mark.parametrize("call", [_forward, _kept, _fused, _dual_store, _backward, _mixed])
def test_concurrent_list_write_gives_result_or_error(call: Callable, disturbed: torch.Tensor, backend: str) -> None:
    x, w = torch.randn(1, 64, 5, 5), torch.randn(64, 64, 1, 1)
    seen = {"right": 0, "raised": 0}
    with torch.no_grad(), bk.use_backend(backend):
        for _ in range(300):
            try:
                call(disturbed, x, w)
                seen["right"] += 1
            except (IndexError, ValueError):
                seen["raised"] += 1
    # How often each outcome occurs depends on the threads; there must be no other.
    assert sum(seen.values()) == 300
