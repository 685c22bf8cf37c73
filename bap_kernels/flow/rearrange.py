"""Which channels the model's own code takes or moves: splits, slices, and shuffles by way of other shapes.

A shuffle is followed on labels: a tensor of numbers that say where each element comes from goes through the same steps.
Where a result has four axes again, and each of its channels is a whole channel of the first tensor, that is the order.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from bap_kernels.flow.arguments import leaves_of, map_leaves
from bap_kernels.flow.graph import Channels
from bap_kernels.flow.ops import rule_of

__all__ = ["Labels", "UnknownNumberError", "moves", "numbers", "parts_of", "sources_of"]

_VIEWS = ("view", "reshape", torch.reshape)
_ARITHMETIC = (operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.neg)


class UnknownNumberError(Exception):
    """An argument depends on more than shapes."""


class _Number(int):
    """A number that another batch or size of image would change."""


def numbers(part: Any, specs: Mapping[fx.Node, Any]) -> Any:
    """Arguments in which steps that compute with shapes are replaced by what they gave on the example.

    Raises:
        UnknownNumberError: for any other step.
    """
    return map_leaves(part, lambda leaf: _number(leaf, specs) if isinstance(leaf, fx.Node) else leaf)


def _number(node: fx.Node, specs: Mapping[fx.Node, Any]) -> Any:
    first = node.args[0] if node.args else None
    shape = specs[first][0] if isinstance(first, fx.Node) and first in specs else None
    target: Any = node.target
    if shape is not None:
        sizes = (*(_Number(side) for side in shape[:1]), *shape[1:2], *(_Number(side) for side in shape[2:]))
        if target is getattr and node.args[1] == "shape":
            return sizes
        if node.op == "call_method" and target == "size" and not node.kwargs:
            return sizes if len(node.args) == 1 else sizes[node.args[1]]  # type: ignore[index]
        raise UnknownNumberError
    if target is operator.getitem:
        whole, where = numbers(node.args, specs)
        return whole[where]
    if target in _ARITHMETIC and not node.kwargs:
        args = numbers(node.args, specs)
        result = target(*args)
        varies = any(isinstance(arg, _Number) for arg in args)
        return _Number(result) if varies and isinstance(result, int) else result
    raise UnknownNumberError


def moves(target: Any) -> bool:
    """Whether a function or method only moves elements or changes shapes."""
    rule = rule_of(target)
    return target == "contiguous" or (rule is not None and rule.kind == "move")


@dataclass(frozen=True)
class Labels:
    """Where each element of a tensor comes from: its number in the first tensor."""

    tensor: Tensor

    @classmethod
    def of(cls, shape: tuple[int, ...]) -> Labels:
        """The first tensor's own."""
        return cls(torch.arange(int(np.prod(shape))).view(shape))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        return tuple(self.tensor.shape)

    def after(self, target: Any, args: tuple[Any, ...], kwargs: Any) -> Labels | None:
        """The labels after a step that :func:`moves` elements; None where that depends on the size of the image."""
        if target in _VIEWS:
            # The image's sides must be the image's: of another size of image a number says nothing.
            last = leaves_of((args, kwargs))[-1:]
            if not last or not (isinstance(last[0], _Number) or self.shape[-1] == 1):
                return None
        try:
            if isinstance(target, str):
                moved = getattr(self.tensor, target)(*args, **kwargs)
            else:
                moved = target(self.tensor, *args, **kwargs)
        except (RuntimeError, TypeError, IndexError):
            return None
        return Labels(moved) if isinstance(moved, Tensor) else None


def sources_of(labels: Labels, shape: tuple[int, ...]) -> Channels | None:
    """The channel of the first tensor, of this shape, that each channel is; None where they are no whole channels."""
    moved = labels.tensor
    N, _, H, W = shape
    if moved.dim() != 4 or (moved.shape[0], *moved.shape[2:]) != (N, H, W) or moved.numel() == 0:
        return None
    first = torch.arange(int(np.prod(shape))).view(shape)
    sources = (moved[0, :, 0, 0] // (H * W)).contiguous()
    return sources.numpy() if torch.equal(first[:, sources], moved) else None


def parts_of(target: Any, channels: int, args: Any, kwargs: Any) -> Channels | list[Channels] | None:
    """The channels that a step takes of (N, C, H, W), or those of each part of a split; None for other steps."""
    rule = rule_of(target)
    if rule is None or rule.kind not in ("split", "shuffle"):
        return None
    if any(isinstance(number, _Number) for number in leaves_of((args, kwargs))):
        return None
    all_channels = torch.arange(channels).view(1, -1, 1, 1)
    name = target if isinstance(target, str) else target.__name__
    if name == "channel_shuffle":
        return torch.nn.functional.channel_shuffle(all_channels, *args, **kwargs).flatten().numpy()
    if name == "getitem":
        where = args[0] if args else None
        if not isinstance(where, tuple) or not 2 <= len(where) <= 4:
            return None
        whole = all(part == slice(None) for part in (where[0], *where[2:]))
        if not whole or not isinstance(where[1], slice) or where[1] == slice(None):
            return None
        return np.arange(channels)[where[1]]
    if name == "narrow":
        given = dict(zip(("dim", "start", "length"), args, strict=False)) | kwargs
        ends = (given.get("start"), given.get("length"))
        if given.get("dim") not in (1, -3) or not all(isinstance(end, int) for end in ends):
            return None
        return np.arange(channels)[given["start"] :][: given["length"]]
    axis = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    function: Any = getattr(torch, name, None)
    if axis not in (1, -3) or function is None:
        return None
    return [part.flatten().numpy() for part in function(all_channels, *args, **kwargs)]
