"""Batches whose samples belong to several domains.

``set_domain(model, numbers)`` sorts the samples by domain on their way into the model and puts the results back into
the caller's order on their way out. In between every layer sees one run of neighbouring samples for each domain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

__all__ = ["MixedBatch", "Runs", "joined", "mixed_numbers", "release_", "sort_batches_"]


def mixed_numbers(numbers: Tensor, domains: Sequence[str]) -> list[int]:
    """The domain number of each sample as a list, checked.

    Args:
        numbers: (N,), int64: places in ``domains``.
        domains: names, in the order of their numbers.

    Raises:
        TypeError: for other dtypes.
        ValueError: for other shapes.
        IndexError: for numbers that no domain has.
    """
    if numbers.dtype != torch.int64:
        raise TypeError(
            f"set_domain(): expected `name` to be int64 domain numbers, got {numbers.dtype}. Hint: .to(torch.int64)."
        )
    if numbers.dim() != 1:
        raise ValueError(
            f"set_domain(): expected `name` to be 1-D, one domain number per sample, got shape {tuple(numbers.shape)}."
        )
    listed = numbers.tolist()
    wrong = [number for number in listed if not 0 <= number < len(domains)]
    if wrong:
        raise IndexError(
            f"set_domain(): expected `name` to hold domain numbers from 0 to {len(domains) - 1}, in the order of "
            f"{list(domains)}, got {wrong[0]}."
        )
    return listed


class MixedBatch:
    """Which sample of a batch belongs to which domain.

    Attributes:
        size: N.
        numbers: the domains that occur, increasing.
        counts: samples of each of them, in that order.
        order: the samples sorted by domain, int64, (N,); None where they are sorted already.
        back: the inverse of ``order``.
        copies: ``order`` (False) and ``back`` (True) on other devices; a CUDA graph cannot capture such a copy.
        entered: how many calls of the model are under way, each of which has sorted its batch.
    """

    def __init__(self, numbers: Sequence[int]) -> None:
        self.size = len(numbers)
        self.numbers = sorted(set(numbers))
        self.counts = [list(numbers).count(number) for number in self.numbers]
        self.entered = 0
        self.order: Tensor | None = None
        self.back: Tensor | None = None
        self.copies: dict[tuple[bool, torch.device], Tensor] = {}
        if list(numbers) != sorted(numbers):
            self.order = torch.tensor(sorted(range(self.size), key=lambda sample: numbers[sample]))
            self.back = torch.empty_like(self.order)
            self.back[self.order] = torch.arange(self.size)

    def check(self, layer: nn.Module, input: Tensor) -> None:
        """Raises unless a layer's input is this batch, sorted."""
        if not self.entered:
            raise RuntimeError(
                f"{type(layer).__name__}(): expected a mixed batch to come by the model that set_domain was given, "
                "got a call of a part of it. Hint: call that model, which sorts the samples."
            )
        if input.dim() < 2 or input.shape[0] != self.size:
            raise ValueError(
                f"{type(layer).__name__}(): expected `input` to have the {self.size} samples of the mixed batch, got "
                f"shape {tuple(input.shape)}."
            )

    def moved(self, values: Any, index: Tensor | None) -> tuple[Any, int]:
        """``values`` with the samples of all its tensors in another order, and how many tensors have this batch."""
        found = 0

        def move(tensor: Tensor) -> Tensor:
            nonlocal found
            if tensor.dim() == 0 or tensor.shape[0] != self.size:
                return tensor
            found += 1
            return tensor if index is None else _taken(tensor, self.on(index, tensor.device))

        return tree_map_only(Tensor, move, values), found

    def on(self, index: Tensor, device: torch.device) -> Tensor:
        """``order`` or ``back`` on a device, copied once."""
        if index.device == device:
            return index
        key = (index is self.back, device)
        if key not in self.copies:
            self.copies[key] = index.to(device)
        return self.copies[key]

    def parts(self, values: Any) -> list[Any]:
        """Sorted ``values`` cut into the runs."""
        found = []
        first = 0
        for count in self.counts:
            run = slice(first, first + count)

            def cut(tensor: Tensor, run: slice = run) -> Tensor:
                return tensor[run] if tensor.dim() > 0 and tensor.shape[0] == self.size else tensor

            found.append(tree_map_only(Tensor, cut, values))
            first += count
        return found


def joined(where: str, results: Sequence[Any]) -> Any:
    """The results of several runs as one; rows that end earlier than the longest are filled up with -inf.

    Raises:
        ValueError: for results of other shapes that differ.
    """
    leaves, structure = zip(*(tree_flatten(result) for result in results), strict=True)

    def join(parts: tuple[Any, ...]) -> Any:
        if not isinstance(parts[0], Tensor):
            return parts[0]
        widths = {part.shape[1:] for part in parts}
        if len(widths) > 1:
            if any(part.dim() != 2 for part in parts):
                raise ValueError(
                    f"{where}(): expected all domains of a mixed batch to give results of one shape, got "
                    f"{sorted(map(tuple, widths))}."
                )
            most = max(part.shape[1] for part in parts)
            # No probability and never the largest: softmax and argmax are each domain's own.
            parts = tuple(F.pad(part, (0, most - part.shape[1]), value=-torch.inf) for part in parts)
        return torch.cat(parts)

    return tree_unflatten([join(parts) for parts in zip(*leaves, strict=True)], structure[0])


def _taken(tensor: Tensor, index: Tensor) -> Tensor:
    taken = tensor.index_select(0, index)
    # index_select forgets the memory format.
    if tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        taken = taken.contiguous(memory_format=torch.channels_last)
    return taken


class _Sort:
    """Forward pre-hook of the model."""

    def __init__(self, batch: MixedBatch) -> None:
        self.batch = batch

    def __call__(self, model: nn.Module, args: Any, kwargs: Any) -> Any:
        moved, found = self.batch.moved((args, kwargs), self.batch.order)
        if not found:
            raise ValueError(
                f"{type(model).__name__}(): expected an input with the {self.batch.size} samples of the mixed batch, "
                "got none. Hint: set_domain(model, numbers) takes one number for each sample of the next batch."
            )
        self.batch.entered += 1
        return moved


class _Restore:
    """Forward hook of the model; it is called after an error too."""

    def __init__(self, batch: MixedBatch) -> None:
        self.batch = batch

    def __call__(self, model: nn.Module, args: Any, result: Any) -> Any:
        self.batch.entered = max(0, self.batch.entered - 1)
        return self.batch.moved(result, self.batch.back)[0]


def sort_batches_(model: nn.Module, batch: MixedBatch) -> None:
    """Makes a model sort what it is given, and put its results back."""
    model.register_forward_pre_hook(_Sort(batch), with_kwargs=True, prepend=True)
    model.register_forward_hook(_Restore(batch), always_call=True)


def release_(model: nn.Module) -> None:
    """Undoes :func:`sort_batches_`."""
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key in [key for key, hook in hooks.items() if isinstance(hook, _Sort | _Restore)]:
            del hooks[key]
            for flags in (model._forward_pre_hooks_with_kwargs, model._forward_hooks_always_called):
                flags.pop(key, None)


class Runs:
    """One layer's part in a mixed batch.

    Attributes:
        batch: the batch, shared by all layers.
        states: what the layer uses for each run: its lists, or one of its domains' modules.
    """

    def __init__(self, batch: MixedBatch, states: Sequence[Any]) -> None:
        self.batch = batch
        self.states = list(states)

    def apply(self, layer: nn.Module, input: Tensor, one: Callable[[Tensor, Any], Tensor]) -> Tensor:
        """The runs' results, one after the other; ``one(samples, state)`` computes those of a run."""
        self.batch.check(layer, input)
        parts = [one(part, state) for part, state in zip(input.split(self.batch.counts), self.states, strict=True)]
        widths = {part.shape[1] for part in parts}
        if len(widths) > 1:
            raise ValueError(
                f"{type(layer).__name__}(): expected all domains of a mixed batch to give as many channels, got "
                f"{sorted(widths)}. Hint: MaskedConv2d keeps the full width."
            )
        return torch.cat(parts)
