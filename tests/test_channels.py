"""ChannelLists: values, copies, devices and checks."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from bap_kernels import ChannelLists


def _int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("value", [[0, 2, 5], (0, 2, 5), np.array([0, 2, 5]), _int32(0, 2, 5)], ids=str)
def test_lists_accept_sequences_arrays_and_int32_tensors(value) -> None:
    lists = ChannelLists(value)
    assert lists.in_index.dtype == torch.int32
    assert lists.in_index.tolist() == [0, 2, 5]
    assert lists.out_index is None
    assert lists.counts == (3, None)


def test_none_differs_from_empty_list() -> None:
    empty = ChannelLists([], None)
    assert empty.in_index.shape == (0,)
    assert empty.in_index.dtype == torch.int32
    assert empty != ChannelLists()
    assert ChannelLists([], None) != ChannelLists(None, [])
    assert empty.counts == (0, None)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (torch.tensor([0, 1]), TypeError, r"`in_index` to be an int32 tensor, got torch.int64. Hint: .*int32"),
        (torch.tensor([0.0]), TypeError, r"int32 tensor, got torch.float32"),
        (torch.tensor([True, False]), TypeError, r"channel numbers, got a mask. Hint: use ChannelLists.from_mask"),
        ([True, False], TypeError, r"sequence of ints, got bool entries. Hint: .*from_mask"),
        ([0.5, 1.0], TypeError, r"sequence of ints, got float64"),
        ("ab", TypeError, r"sequence of ints"),
        (_int32(0, 1).reshape(1, 2), ValueError, r"`in_index` to be 1-D, got 2 dimensions"),
        ([[0, 1]], ValueError, r"1-D, got 2 dimensions"),
        ([2, 1], ValueError, r"sorted without repeats, got \[2, 1\]. Hint: sort it"),
        (_int32(1, 1), ValueError, r"sorted without repeats, got \[1, 1\]"),
        ([-1, 2], IndexError, r"from 0 to 2\*\*31 - 1, got -1"),
        ([0, 2**31], IndexError, r"got 2147483648"),
        (_int32(0, 1).to("meta"), ValueError, r"to hold values, got a tensor on the meta device. Hint"),
    ],
    ids=str,
)
def test_invalid_list_raises(value, error, message) -> None:
    with pytest.raises(error, match=message):
        ChannelLists(value)
    with pytest.raises(error, match=message.replace("in_index", "out_index")):
        ChannelLists(None, value)


def test_lists_are_immutable_copies() -> None:
    index = _int32(0, 2)
    lists = ChannelLists(index)
    index[0] = 1
    assert lists.in_index.tolist() == [0, 2]
    with pytest.raises(AttributeError):
        lists.in_index = index


def test_from_mask_accepts_bools_and_zeros_and_ones() -> None:
    lists = ChannelLists.from_mask(torch.tensor([True, False, True]), np.array([0.0, 1.0]))
    assert lists == ChannelLists([0, 2], [1])
    assert ChannelLists.from_mask([0, 0]) == ChannelLists([])
    assert ChannelLists.from_mask() == ChannelLists()
    with pytest.raises(ValueError, match=r"`out_mask` to hold only 0 and 1"):
        ChannelLists.from_mask(out_mask=[0.5])
    with pytest.raises(ValueError, match=r"`in_mask` to be 1-D, got 0"):
        ChannelLists.from_mask(torch.tensor(True))


def test_equality_and_hash_follow_the_values() -> None:
    a, b = ChannelLists([0, 2], [1]), ChannelLists(_int32(0, 2), (1,))
    assert a == b
    assert hash(a) == hash(b)
    assert a != ChannelLists([0, 2], [0])
    assert a != ([0, 2], [1])
    assert len({a, b, ChannelLists([0])}) == 2


def test_copies_and_pickles_are_equal() -> None:
    for lists in (ChannelLists([0, 2], []), ChannelLists(), ChannelLists(None, [7])):
        for other in (copy.deepcopy(lists), copy.copy(lists), pickle.loads(pickle.dumps(lists))):
            assert other == lists
            for name in ("in_index", "out_index"):
                original, copied = getattr(lists, name), getattr(other, name)
                assert (original is None) == (copied is None)
                assert original is None or torch.equal(original, copied)


def test_values_survive_the_meta_device() -> None:
    lists = ChannelLists([0, 2], [1])
    assert lists.to("cpu") is lists
    meta = lists.to("meta")
    assert meta.in_index.is_meta
    assert meta.out_index.is_meta
    assert meta == lists
    assert meta.to("cpu").in_index.tolist() == [0, 2]
    assert pickle.loads(pickle.dumps(meta)).out_index.tolist() == [1]


def test_lists_ignore_the_default_device() -> None:
    with torch.device("meta"):
        assert ChannelLists([0, 2]).in_index.tolist() == [0, 2]


def test_repr_is_short() -> None:
    assert repr(ChannelLists([0, 2])) == "ChannelLists(in_index=[0, 2], out_index=None)"
    assert repr(ChannelLists(range(9))) == "ChannelLists(in_index=[0, 1, ..., 8] (9 channels), out_index=None)"


def test_validate_for_checks_channel_range() -> None:
    conv = nn.Conv2d(8, 4, 1)
    ChannelLists([7], [3]).validate_for(conv)
    ChannelLists([], []).validate_for(conv)
    with pytest.raises(IndexError, match=r"`in_index` of layer 'a.b' to hold channel numbers from 0 to 7, got 8"):
        ChannelLists([8]).validate_for(conv, "a.b")
    with pytest.raises(IndexError, match=r"`out_index` to hold channel numbers from 0 to 3, got 4"):
        ChannelLists([7], [4]).validate_for(conv)


def test_validate_for_depthwise_requires_equal_lists() -> None:
    conv = nn.Conv2d(8, 8, 3, groups=8)
    ChannelLists().validate_for(conv)
    ChannelLists([1, 3], [1, 3]).validate_for(conv)
    for lists in (ChannelLists([1, 3]), ChannelLists(None, [1]), ChannelLists([1, 3], [1, 4])):
        with pytest.raises(ValueError, match=r"`out_index` to equal `in_index`, as the layer is depthwise"):
            lists.validate_for(conv)
