"""What zeros leave a convolution to read, and the hook by which plans, which follow zeros, say how they are found."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import nn

from bap_kernels.channels import ChannelLists

__all__ = ["Zeros", "find_zeros", "set_zeros_finder"]


class Zeros(NamedTuple):
    """What zeros leave one convolution to read.

    Attributes:
        lists: the in-list; None where it reads everything.
        note: what was found, in words.
        zero_weights, weights: how many of its single weights are zero, and how many there are.
        near_zero: slices for a channel that are read and far below the layer's largest weight.
        swappable: whether a table may name it.
    """

    lists: ChannelLists
    note: str
    zero_weights: int
    weights: int
    near_zero: int = 0
    swappable: bool = True

    @property
    def counts(self) -> tuple[int, int, int]:
        return self.zero_weights, self.weights, self.near_zero


_zeros_finder: Callable[[str, nn.Module, Any], Mapping[str, Zeros]] | None = None


def set_zeros_finder(finder: Callable[[str, nn.Module, Any], Mapping[str, Zeros]]) -> None:
    """Says how zeros are followed through a network; that needs plans, which import this module."""
    global _zeros_finder
    _zeros_finder = finder


def find_zeros(op: str, model: nn.Module, example: Any) -> Mapping[str, Zeros]:
    """{layer: what its zeros leave}, by the finder that was set."""
    assert _zeros_finder is not None
    return _zeros_finder(op, model, example)
