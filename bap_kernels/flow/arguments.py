"""Arguments of calls: tuples, lists, dictionaries and slices of anything."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.fx.immutable_collections import immutable_dict

__all__ = ["leaves_of", "map_leaves", "tensors_of"]


def map_leaves(part: Any, function: Callable[[Any], Any]) -> Any:
    """The same structure with every leaf replaced; kinds of list and dictionary of torch.fx become Python's own.

    Subclasses of dict, with rules of their own, are leaves.

    Examples:
        >>> from bap_kernels.flow.arguments import map_leaves
        >>> map_leaves(((1, [2]), slice(3, None)), lambda leaf: leaf and 10 * leaf)
        ((10, [20]), slice(30, None, None))
    """
    if isinstance(part, tuple):
        parts = [map_leaves(item, function) for item in part]
        return type(part)(*parts) if hasattr(part, "_fields") else tuple(parts)
    if isinstance(part, list):
        return [map_leaves(item, function) for item in part]
    if type(part) in (dict, OrderedDict, immutable_dict):
        pairs = ((key, map_leaves(item, function)) for key, item in part.items())
        return OrderedDict(pairs) if isinstance(part, OrderedDict) else dict(pairs)
    if isinstance(part, slice):
        return slice(*(map_leaves(end, function) for end in (part.start, part.stop, part.step)))
    return function(part)


def leaves_of(part: Any) -> list[Any]:
    """All leaves, in order."""
    leaves: list[Any] = []
    map_leaves(part, leaves.append)
    return leaves


def tensors_of(part: Any) -> list[Tensor]:
    """The tensors among the leaves, each once, in order."""
    return list({id(leaf): leaf for leaf in leaves_of(part) if isinstance(leaf, Tensor)}.values())
