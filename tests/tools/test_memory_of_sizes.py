"""Packed weights over inputs of many sizes: their number and their limit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import bap_kernels as bk
from bap_kernels import _C
from bap_kernels.settings import settings
from tools.memory_of_sizes import measure, resident_bytes, sizes


@pytest.fixture(autouse=True)
def _empty_caches() -> Iterator[None]:
    limit = bk.packed_cache_info()["limit_bytes"]
    _C.set_choice_file("")
    bk.clear_choices()
    bk.clear_packed_cache()
    yield
    bk.clear_choices()
    bk.clear_packed_cache()
    bk.set_packed_cache_limit(limit)
    _C.set_choice_file(str(settings.choice_file or ""))


def test_sizes_are_different() -> None:
    assert len(set(sizes(200))) == 200
    assert max(max(size) for size in sizes(200)) < 4 + 16


def test_many_sizes_add_few_packed_weights() -> None:
    rows = list(measure(120, 2**30, every=20, large_every=20))
    assert [row[0] for row in rows] == [20, 40, 60, 80, 100, 120]
    # Of each of the two layers: one per format of the candidates, and four orders of oneDNN.
    assert all(entries <= 2 * 9 for _, _, entries, _, _ in rows)
    assert all(resident > 0 for _, resident, _, _, _ in rows)
    assert resident_bytes() > 2**20


@pytest.mark.parametrize("limit", [0, 2**12, 2**19])
def test_packed_weights_stay_within_limit(limit: int) -> None:
    for _, _, _, packed, _ in measure(60, limit, every=10, large_every=20):
        assert packed <= limit
