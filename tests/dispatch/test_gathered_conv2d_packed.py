"""Cached packed weights: right after every change, within the limit, evicted least recently used first."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

from bap_kernels import _C, reference
from bap_kernels.testing import Case, Sample, assert_close, make_tensors, run

CASE = Case(1, 32, 24, (8, 9), in_list="odd", out_list="odd", seed=5)
LAYOUTS = ("contiguous", "channels_last")


@pytest.fixture(autouse=True)
def _empty_cache() -> Iterator[None]:
    limit = _C.packed_cache_info()["limit_bytes"]
    _C.clear_packed_cache()
    yield
    _C.set_packed_cache_limit(limit)
    _C.clear_packed_cache()


def assert_right(sample: Sample, backend: str) -> None:
    for _ in range(2):
        y = run(sample, backend, cache_packed=True)
        assert_close(y, reference.conv_on_selected(*sample.args), sample.input.dtype, sample.depth)


def counts() -> tuple[int, int, int]:
    info = _C.packed_cache_info()
    return info["hits"], info["misses"], info["evictions"]


def test_second_call_is_a_hit(backend: str) -> None:
    sample = make_tensors(CASE)
    run(sample, backend, cache_packed=True)
    info = _C.packed_cache_info()
    assert info["entries"] >= 1
    assert 0 < info["bytes"] <= info["limit_bytes"]
    hits, misses, _ = counts()
    first = run(sample, backend, cache_packed=True)
    assert counts()[0] == hits + 1
    assert counts()[1] == misses
    assert torch.equal(first, run(sample, backend, cache_packed=False))
    assert counts()[:2] == (hits + 1, misses)


def test_call_without_caching_keeps_nothing(backend: str) -> None:
    before = counts()
    run(make_tensors(CASE), backend, cache_packed=False)
    assert _C.packed_cache_info()["entries"] == 0
    assert counts()[0] == before[0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["weight", "bias", "in_index", "out_index"])
def test_in_place_change_is_used(name: str, layout: str, backend: str) -> None:
    sample = make_tensors(CASE.but(layout=layout))
    assert_right(sample, backend)
    changed = getattr(sample, name)
    if changed.dtype == torch.int32:
        changed.copy_(torch.arange(changed.numel(), dtype=torch.int32))
    else:
        changed.mul_(2).add_(1)
    assert_right(sample, backend)
    changed[:1] = changed[:1] + (0 if changed.dtype == torch.int32 else 3)
    assert_right(sample, backend)


def test_optimizer_step_and_load_state_are_used(backend: str) -> None:
    conv = torch.nn.Conv2d(32, 24, 3, padding=1)
    sample = make_tensors(CASE)
    sample.weight, sample.bias = conv.weight, conv.bias
    optimizer = torch.optim.SGD(conv.parameters(), lr=0.1)
    with torch.no_grad():
        assert_right(sample, backend)
    conv(sample.input).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        assert_right(sample, backend)
    conv.load_state_dict(torch.nn.Conv2d(32, 24, 3).state_dict())
    with torch.no_grad():
        assert_right(sample, backend)
    # The same tensor with another storage.
    conv.weight.data = torch.randn_like(conv.weight)
    with torch.no_grad():
        assert_right(sample, backend)


def test_change_through_view_is_used(backend: str) -> None:
    sample = make_tensors(CASE)
    flat = sample.weight.view(-1)
    assert_right(sample, backend)
    flat.mul_(-1)
    assert_right(sample, backend)


def test_change_of_inference_tensor_is_used(backend: str) -> None:
    with torch.inference_mode():
        sample = make_tensors(CASE)
        assert_right(sample, backend)
        sample.weight.mul_(2)
        assert_right(sample, backend)


def test_entry_of_inference_mode_is_used_in_training(backend: str) -> None:
    sample = make_tensors(CASE)
    with torch.inference_mode():
        run(sample, backend, cache_packed=True)
    sample.input.requires_grad_()
    run(sample, backend, cache_packed=True).sum().backward()
    assert sample.input.grad is not None


def test_freed_weight_is_not_found_at_reused_address(backend: str) -> None:
    # The allocator reuses addresses: an address alone does not identify a weight.
    for seed in range(20):
        sample = make_tensors(CASE.but(seed=seed, in_list="all", out_list="all"))
        assert_right(sample, backend)
        del sample
    gc.collect()
    assert _C.packed_cache_info()["entries"] == 0
    assert _C.packed_cache_info()["bytes"] == 0


def test_weight_has_one_entry_per_lists(backend: str) -> None:
    sample = make_tensors(CASE)
    lists = [torch.arange(first, 32, 3, dtype=torch.int32) for first in range(3)]
    for _ in range(2):
        for index in lists:
            sample.in_index = index
            assert_right(sample, backend)
    assert _C.packed_cache_info()["entries"] >= 3


def test_layouts_have_separate_entries(backend: str) -> None:
    sample = make_tensors(CASE)
    assert_right(sample, backend)
    sample.input = sample.input.contiguous(memory_format=torch.channels_last)
    assert_right(sample, backend)
    sample.stride, sample.dilation = (2, 1), (1, 2)
    assert_right(sample, backend)
    sample.weight = sample.weight.to(memory_format=torch.channels_last)
    assert_right(sample, backend)


def test_limit_zero_keeps_nothing(backend: str) -> None:
    _C.set_packed_cache_limit(0)
    sample = make_tensors(CASE)
    assert_right(sample, backend)
    sample.weight.add_(1)
    assert_right(sample, backend)
    info = _C.packed_cache_info()
    assert (info["entries"], info["bytes"], info["limit_bytes"]) == (0, 0, 0)


# Measurements of "auto" pack for every candidate.
@pytest.mark.parametrize("backend", ["aten", "native"], indirect=True)
def test_least_recently_used_entry_is_evicted(backend: str) -> None:
    samples = [make_tensors(CASE.but(seed=5)) for _ in range(3)]
    run(samples[0], backend, cache_packed=True)
    one = _C.packed_cache_info()["bytes"]
    _C.set_packed_cache_limit(2 * one + one // 2)
    run(samples[1], backend, cache_packed=True)
    run(samples[0], backend, cache_packed=True)
    before = counts()
    run(samples[2], backend, cache_packed=True)
    assert counts()[2] == before[2] + 1
    run(samples[0], backend, cache_packed=True)
    assert counts()[0] == before[0] + 1, "the entry used last went"
    misses = counts()[1]
    run(samples[1], backend, cache_packed=True)
    assert counts()[1] == misses + 1, "the entry used least recently stayed"
    assert _C.packed_cache_info()["bytes"] <= 2 * one + one // 2


def test_entry_larger_than_limit_is_not_kept(backend: str) -> None:
    _C.set_packed_cache_limit(16)
    assert_right(make_tensors(CASE), backend)
    assert _C.packed_cache_info()["bytes"] <= 16


def test_smaller_limit_evicts_at_once(backend: str) -> None:
    sample = make_tensors(CASE)
    run(sample, backend, cache_packed=True)
    assert _C.packed_cache_info()["bytes"] > 0
    _C.set_packed_cache_limit(0)
    assert _C.packed_cache_info()["bytes"] == 0
    assert_right(sample, backend)


def test_clear_drops_all_entries(backend: str) -> None:
    sample = make_tensors(CASE)
    run(sample, backend, cache_packed=True)
    _C.clear_packed_cache()
    assert _C.packed_cache_info()["entries"] == 0
    assert_right(sample, backend)


def test_negative_limit_raises() -> None:
    with pytest.raises(ValueError, match=r"set_packed_cache_limit\(\): expected .* at least 0, got -1"):
        _C.set_packed_cache_limit(-1)
