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
from torch import Tensor, fx, nn

from bap_kernels.plan.graph import Channels

__all__ = ["Labels", "UnknownNumberError", "moves", "numbers", "parts_of", "sources_of"]

_SHAPING = (
    *("view", "reshape", "transpose", "permute", "contiguous", "flatten", "unflatten", "swapaxes", "swapdims"),
    *(torch.reshape, torch.transpose, torch.permute, torch.flatten, torch.unflatten, torch.swapaxes, torch.swapdims),
)
_VIEWS = ("view", "reshape", torch.reshape)
_ARITHMETIC = (operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.neg)


class UnknownNumberError(Exception):
    """An argument depends on more than shapes."""


class _Number(int):
    """A number that another batch or size of image would change."""


def numbers(part: Any, facts: Mapping[fx.Node, Any]) -> Any:
    """Arguments with what steps that compute with shapes gave on the example in these steps' places.

    Raises:
        UnknownNumberError: for any other step.
    """
    if isinstance(part, fx.Node):
        return _number(part, facts)
    if isinstance(part, (tuple, list)):
        found = [numbers(one, facts) for one in part]
        return found if isinstance(part, list) else tuple(found)
    if isinstance(part, dict):
        return {key: numbers(one, facts) for key, one in part.items()}
    if isinstance(part, slice):
        return slice(*(numbers(one, facts) for one in (part.start, part.stop, part.step)))
    return part


def _number(node: fx.Node, facts: Mapping[fx.Node, Any]) -> Any:
    first = node.args[0] if node.args else None
    shape = facts[first][0] if isinstance(first, fx.Node) and first in facts else None
    target: Any = node.target
    if shape is not None:
        sizes = (*(_Number(side) for side in shape[:1]), *shape[1:2], *(_Number(side) for side in shape[2:]))
        if target is getattr and node.args[1] == "shape":
            return sizes
        if node.op == "call_method" and target == "size" and not node.kwargs:
            return sizes if len(node.args) == 1 else sizes[node.args[1]]  # type: ignore[index]
        raise UnknownNumberError
    if target is operator.getitem:
        whole, where = numbers(node.args, facts)
        return whole[where]
    if target in _ARITHMETIC and not node.kwargs:
        args = numbers(node.args, facts)
        result = target(*args)
        varies = any(isinstance(one, _Number) for one in args)
        return _Number(result) if varies and isinstance(result, int) else result
    raise UnknownNumberError


def moves(target: Any) -> bool:
    """Whether a function or method only moves elements or changes shapes."""
    return target in _SHAPING


def _flat(part: Any) -> list[Any]:
    if isinstance(part, dict):
        part = list(part.values())
    if isinstance(part, slice):
        part = [part.start, part.stop, part.step]
    return [one for item in part for one in _flat(item)] if isinstance(part, (tuple, list)) else [part]


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
            last = _flat((args, kwargs))[-1:]
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
    if isinstance(target, nn.Module):
        return None
    if any(isinstance(one, _Number) for one in _flat((args, kwargs))):
        return None
    all_of = torch.arange(channels).view(1, -1, 1, 1)
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    if name == "getitem":
        where = args[0] if args else None
        if not isinstance(where, tuple) or not 2 <= len(where) <= 4:
            return None
        whole = all(one == slice(None) for one in (where[0], *where[2:]))
        if not whole or not isinstance(where[1], slice) or where[1] == slice(None):
            return None
        return np.arange(channels)[where[1]]
    if name in ("chunk", "split", "tensor_split", "split_with_sizes"):
        axis = kwargs.get("dim", args[1] if len(args) > 1 else 0)
        function: Any = getattr(torch, name, None)
        if axis not in (1, -3) or function is None:
            return None
        found = function(all_of, *args, **kwargs)
        return [one.flatten().numpy() for one in found]
    if name == "narrow":
        given = dict(zip(("dim", "start", "length"), args, strict=False)) | kwargs
        if given.get("dim") not in (1, -3) or not all(isinstance(given.get(one), int) for one in ("start", "length")):
            return None
        return np.arange(channels)[given["start"] :][: given["length"]]
    if name == "channel_shuffle":
        return torch.nn.functional.channel_shuffle(all_of, *args, **kwargs).flatten().numpy()
    return None
