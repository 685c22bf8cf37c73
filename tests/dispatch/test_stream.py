"""Cached tensors under captured graphs and on several streams, which a simulation stands for: no GPU is needed."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import bap_kernels as bk
from bap_kernels import _C, reference
from bap_kernels.nn.mixed import MixedBatch
from bap_kernels.testing import Case, Sample, assert_close, make_tensors, run

CASE = Case(1, 32, 24, (8, 9), in_list="odd", out_list="odd", seed=5)


@pytest.fixture(autouse=True)
def _no_simulation() -> Iterator[None]:
    limit = _C.packed_cache_info()["limit_bytes"]
    bk.clear_packed_cache()
    _C.take_stream_log()
    yield
    _C.simulate_stream(None)
    bk.set_packed_cache_limit(limit)
    bk.clear_packed_cache()


@pytest.fixture(params=["aten", "native"])
def backend(request: pytest.FixtureRequest) -> str:
    if _C.unsupported_reason(request.param) is not None:
        pytest.skip("no instructions for the native kernels")
    return request.param


def computed(sample: Sample, backend: str) -> Tensor:
    y = run(sample, backend, cache_packed=True)
    assert_close(y, reference.conv_on_selected(*sample.args), sample.input.dtype, sample.depth)
    return y


def info() -> dict[str, int]:
    return bk.packed_cache_info()


def test_nothing_is_kept_of_what_a_capture_records(backend: str) -> None:
    sample = make_tensors(CASE)
    hits = info()["hits"]
    _C.simulate_stream(1, capturing=True)
    for _ in range(2):
        computed(sample, backend)
    assert (info()["entries"], info()["hits"]) == (0, hits)
    # The capture has only recorded how it is packed: the next call must pack, not read it.
    _C.simulate_stream(1)
    misses = info()["misses"]
    computed(sample, backend)
    assert info()["misses"] == misses + 1
    assert info()["entries"] == 1


@pytest.mark.parametrize("drop", ["clear", "evict", "write", "step"])
def test_what_a_graph_reads_lives_as_long_as_its_weight(drop: str, backend: str) -> None:
    sample = make_tensors(CASE)
    sample.weight = nn.Parameter(sample.weight)
    with torch.no_grad():
        _C.simulate_stream(1)
        computed(sample, backend)
        before = info()["pinned"]
        _C.simulate_stream(2, capturing=True)
        hits = info()["hits"]
        computed(sample, backend)
        assert info()["hits"] == hits + 1
        pinned = info()["pinned"]
        assert pinned > before
        _C.simulate_stream(1)
        if drop == "clear":
            bk.clear_packed_cache()
        elif drop == "evict":
            bk.set_packed_cache_limit(0)
        elif drop == "write":
            sample.weight.mul_(2)
            computed(sample, backend)
        else:
            torch.optim.SGD([sample.weight], 0.1).step()
        assert info()["pinned"] == pinned
    del sample
    gc.collect()
    assert info()["pinned"] == before


@pytest.mark.parametrize("op", ["forward", "fused", "backward", "mixed"])
def test_captured_calls_keep_their_lists(op: str) -> None:
    sample = make_tensors(CASE)
    _C.simulate_stream(1, capturing=True)
    before, ops, arguments = info()["pinned"], torch.ops.bap_kernels, sample.args
    if op == "forward":
        ops.gathered_conv2d(*arguments)
    elif op == "fused":
        ops._gathered_conv2d_fused(*arguments, None, None, False, None, None, None, False)
    elif op == "backward":
        grad = torch.randn(sample.output_shape)
        ops.gathered_conv2d_backward(grad, *arguments[:2], *arguments[3:], [True] * 3)
    else:
        lists = [sample.in_index, sample.in_index[:3]]
        x = torch.cat([sample.input, sample.input])
        ops._gathered_conv2d_mixed(x, *arguments[1:3], lists, [1, 1], *arguments[5:8])
    assert info()["pinned"] == before + 2
    del sample, arguments
    gc.collect()
    assert info()["pinned"] == before


def test_outside_of_captures_nothing_is_pinned() -> None:
    before = info()["pinned"]
    _C.simulate_stream(1)
    _C.pin_for_graph(torch.zeros(1), torch.zeros(2))
    assert info()["pinned"] == before


def test_packed_weight_is_complete_before_another_stream_may_read_it(backend: str) -> None:
    sample = make_tensors(CASE)
    _C.simulate_stream(7)
    computed(sample, backend)
    assert _C.take_stream_log() == ["wait for 7"]
    computed(sample, backend)
    assert _C.take_stream_log() == []
    # The allocator is told once of every other stream.
    for _ in range(2):
        _C.simulate_stream(8)
        computed(sample, backend)
    assert _C.take_stream_log() == ["used on 8"]
    # In a capture neither may be waited nor may the allocator be told; a pin does it.
    _C.simulate_stream(9, capturing=True)
    computed(sample, backend)
    assert _C.take_stream_log() == []


def test_list_form_is_complete_before_another_stream_may_read_it() -> None:
    index = torch.arange(16, dtype=torch.int32)
    for derive in (lambda: _C.list_form(index, 32)[0], lambda: _C.inverse_list(index, 32)):
        _C.simulate_stream(7)
        first = derive()
        assert _C.take_stream_log() == ["wait for 7"]
        _C.simulate_stream(8)
        assert derive() is first
        assert _C.take_stream_log() == ["used on 8"]


def test_lists_first_met_in_a_capture_are_not_read_and_not_kept() -> None:
    index = torch.arange(16, dtype=torch.int32)
    _C.simulate_stream(1, capturing=True)
    entries, block, length = _C.list_form(index, 32)
    assert (block, length) == (1, 16)
    assert entries is index
    recorded = _C.inverse_list(index, 32)
    every = _C.all_channels(1234, torch.device("cpu"))
    assert _C.take_stream_log() == []
    _C.simulate_stream(1)
    assert _C.list_form(index, 32)[1] == 16
    assert _C.inverse_list(index, 32) is not recorded
    assert _C.all_channels(1234, torch.device("cpu")) is not every


def test_form_that_a_graph_reads_lives_as_long_as_its_list() -> None:
    index = torch.arange(16, dtype=torch.int32)
    entries = _C.list_form(index, 32)[0]
    before = info()["pinned"]
    _C.simulate_stream(1, capturing=True)
    assert _C.list_form(index, 32)[0] is entries
    assert info()["pinned"] == before + 1
    _C.simulate_stream(1)
    assert entries is not None
    reading = weakref.ref(entries)
    del entries
    # The graph goes on with the list that it was captured with.
    index[0] = 20
    _C.list_form(index, 32)
    gc.collect()
    assert reading() is not None
    del index
    gc.collect()
    assert info()["pinned"] == before
    assert reading() is None


def test_new_order_of_a_mixed_batch_is_refused_in_a_capture() -> None:
    batch, device = MixedBatch([1, 0, 1]), torch.device("meta")
    _C.simulate_stream(1, capturing=True)
    message = (
        r"set_domain\(\): expected `name` to be a mixed batch that was computed before the capture of a CUDA graph, "
        r"since its order is copied to meta, got a new one of 3 samples\. Hint: call the model on the batch once"
    )
    with pytest.raises(RuntimeError, match=message):
        batch.on("order", device)
    _C.simulate_stream(1)
    copy = batch.on("order", device)
    _C.simulate_stream(1, capturing=True)
    assert batch.on("order", device) is copy


def test_new_table_of_a_mixed_batch_is_refused_in_a_capture() -> None:
    pytest.importorskip("triton")
    from bap_kernels.triton import mixed

    runs, weight = (mixed._Run(0, 2, 8, 0, 0), mixed._Run(2, 1, 4, 8, 96)), torch.zeros(1)
    _C.simulate_stream(1, capturing=True)
    message = (
        r"gathered_conv2d_mixed\(\): expected a mixed batch of a make-up that was computed before the capture of a "
        r"CUDA graph, since its table comes from the host, got runs of \[2, 1\] images for the first time\. Hint: call"
    )
    with pytest.raises(RuntimeError, match=message):
        mixed._table(runs, weight, 6, 4)
    _C.simulate_stream(1)
    table = mixed._table(runs, weight, 6, 4)
    assert table.runs[:, 0].tolist() == [12, 18]
    assert table.tiles.tolist() == [[0, 0], [4, 0], [8, 0], [12, 1], [16, 1]]
    _C.take_stream_log()
    _C.simulate_stream(2)
    mixed._table(runs, weight, 6, 4)
    assert _C.take_stream_log() == ["used on 2"]
    before = info()["pinned"]
    _C.simulate_stream(2, capturing=True)
    mixed._table(runs, weight, 6, 4)
    assert info()["pinned"] == before + 1
