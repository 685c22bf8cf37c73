"""Lists as kernels take them, their inverses and packed weights: right, kept with their tensors, and made again."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor

from bap_kernels import _C


def ints(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("b", [8, 16, 32])
def test_blocks_are_recognised(b: int) -> None:
    channels = [b * c + d for c in (5, 0, 3) for d in range(b)]
    entries, block, length = _C.list_form(ints(channels), 8 * b)
    assert (block, length) == (b, 3 * b)
    assert entries is not None
    assert entries.tolist() == [5, 0, 3]
    assert entries.dtype == torch.int32
    for most in (8, 16, 32):
        entries, block, _ = _C.list_form(ints(channels), 8 * b, most=most)
        assert block == min(b, most)
        assert entries is not None
        assert [block * c + d for c in entries.tolist() for d in range(block)] == channels
    assert _C.list_form(ints(channels), 8 * b, blocks=False)[1] == 1


@pytest.mark.parametrize(
    "channels",
    [[], [0], list(range(1, 9)), list(range(7)), [*range(7), 8], [7, 6, 5, 4, 3, 2, 1, 0], [*range(8), *range(9, 17)]],
)
def test_other_lists_are_taken_channel_by_channel(channels: list[int]) -> None:
    entries, block, length = _C.list_form(ints(channels), 32)
    assert (block, length) == (1, len(channels))
    assert entries is not None
    assert entries.tolist() == channels


def test_no_list_and_strided_lists() -> None:
    assert _C.list_form(None, 12) == (None, 0, 12)
    stepped = torch.arange(32, dtype=torch.int32)[::3]
    entries, _, _ = _C.list_form(stepped, 32)
    assert entries is not None
    assert entries.is_contiguous()
    assert entries.tolist() == stepped.tolist()


def test_changed_list_is_read_again() -> None:
    index = torch.arange(16, dtype=torch.int32)
    first, block, _ = _C.list_form(index, 32)
    assert block == 16
    assert _C.list_form(index, 32)[0] is first
    # Two forms of one list are kept side by side.
    assert _C.list_form(index, 32, most=8)[1] == 8
    assert _C.list_form(index, 32)[0] is first
    index[0] = 20
    assert _C.list_form(index, 32)[1] == 1
    with torch.inference_mode():
        assert _C.list_form(torch.arange(16, dtype=torch.int32), 32)[1] == 1


def test_list_with_other_memory_is_read_again() -> None:
    index = torch.arange(16, dtype=torch.int32)
    _C.list_form(index, 32)
    index.data = torch.arange(1, 17, dtype=torch.int32)
    assert _C.list_form(index, 32)[1] == 1


def test_forms_of_lists_that_are_gone_are_dropped() -> None:
    index = torch.arange(16, dtype=torch.int32)
    entries = _C.list_form(index, 32)[0]
    assert entries is not None
    reference = weakref.ref(entries)
    del index, entries
    gc.collect()
    # Looked for once as many lists were met as there were before.
    kept = []
    for _ in range(10_000):
        if reference() is None:
            break
        kept.append(ints([1, 0]))
        _C.list_form(kept[-1], 2)
    assert reference() is None


def test_inverse_follows_its_list() -> None:
    index = ints([4, 0])
    first = _C.inverse_list(index, 6)
    assert first.tolist() == [1, -1, -1, -1, 0, -1]
    assert first.dtype == torch.int32
    assert _C.inverse_list(index, 6) is first
    assert _C.inverse_list(index, 5).tolist() == [1, -1, -1, -1, 0]
    index[0] = 5
    assert _C.inverse_list(index, 6).tolist() == [1, -1, -1, -1, -1, 0]
    with torch.inference_mode():
        unseen = ints([1])
        assert _C.inverse_list(unseen, 2).tolist() == [-1, 0]
        unseen[0] = 0
        assert _C.inverse_list(unseen, 2).tolist() == [0, -1]
        assert not _C.inverse_list(index.clone(), 6).is_inference()


def test_all_channels_are_made_once() -> None:
    every = _C.all_channels(5, torch.device("cpu"))
    assert every.tolist() == [0, 1, 2, 3, 4]
    assert every.dtype == torch.int32
    assert _C.all_channels(5, torch.device("cpu")) is every


@pytest.mark.parametrize("by_input", [False, True])
def test_pack_weight(by_input: bool) -> None:
    weight, rows, columns = torch.randn(7, 9, 3, 2), ints([6, 1, 2]), ints([8, 0])
    packed = _C.pack_weight(weight, rows, columns, by_input)
    slices = weight[rows.long()][:, columns.long()]
    slices = slices.transpose(0, 1) if by_input else slices
    first, last = slices.shape[:2]
    assert packed.shape == (first, 6, _C.PACKED_ALIGNMENT)
    assert torch.equal(packed[:, :, :last], slices.permute(0, 2, 3, 1).reshape(first, 6, last))
    assert not packed[:, :, last:].any()
