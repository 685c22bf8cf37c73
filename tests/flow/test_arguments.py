"""Structures of arguments are rebuilt with every leaf replaced."""

from __future__ import annotations

from collections import OrderedDict, namedtuple

import torch
from torch.fx.immutable_collections import immutable_dict, immutable_list

from bap_kernels.flow.arguments import leaves_of, map_leaves, tensors_of

Pair = namedtuple("Pair", ["a", "b"])


def test_every_kind_of_structure_is_kept() -> None:
    part = (1, [2, Pair(3, 4)], {"x": 5}, OrderedDict(y=6), slice(7, None, 8), torch.Size((9,)))
    doubled = map_leaves(part, lambda leaf: None if leaf is None else 2 * leaf)
    assert doubled == (2, [4, Pair(6, 8)], {"x": 10}, OrderedDict(y=12), slice(14, None, 16), (18,))
    assert type(doubled[1][1]) is Pair
    assert type(doubled[3]) is OrderedDict
    assert leaves_of(part) == [1, 2, 3, 4, 5, 6, 7, None, 8, 9]


def test_immutable_kinds_become_pythons_own() -> None:
    plain = map_leaves(immutable_list([immutable_dict(a=1)]), lambda leaf: leaf)
    assert type(plain) is list
    assert type(plain[0]) is dict


def test_dictionaries_with_rules_of_their_own_are_leaves() -> None:
    class Output(dict):
        pass

    output = Output(a=1)
    assert leaves_of([output]) == [output]


def test_each_tensor_is_found_once() -> None:
    a, b = torch.zeros(1), torch.zeros(1)
    found = tensors_of([a, {"x": (b, a)}, 3])
    assert [tensor is other for tensor, other in zip(found, (a, b), strict=True)] == [True, True]
