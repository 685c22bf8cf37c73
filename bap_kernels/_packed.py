"""Packed weights within one limit, and the events after which they are dropped, whatever their tensors say."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from bap_kernels._load import _C

__all__ = ["PackedWeights", "count_steps", "drop_packed", "packed_weights"]

# Steps of optimisers that each watched tensor was part of.
_steps: WeakIdKeyDictionary = WeakIdKeyDictionary()


Key = tuple[object, ...]
State = tuple[int, ...]


@dataclass(frozen=True)
class _Entry:
    parts: tuple[weakref.ref[Tensor], ...]
    # By weak references, so that another storage cannot get the same address.
    storages: tuple[StorageWeakRef, ...]
    state: State
    packed: Tensor

    def holds(self, parts: tuple[Tensor, ...], state: State) -> bool:
        return (
            self.state == state
            # Another tensor may have got the identity of one that is gone.
            and all(ref() is part for ref, part in zip(self.parts, parts, strict=True))
            and all(ref.cdata == _storage(part)._cdata for ref, part in zip(self.storages, parts, strict=True))
        )


def _storage(part: Tensor) -> torch.UntypedStorage:
    return part.untyped_storage()


class PackedWeights:
    """Least recently used packed weights of backends in Python, within one limit with those of the C++ part.

    What is held here is taken off the limit of the C++ part, which drops its own least recently used ones for it.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.held_bytes = 0
        self.entries: OrderedDict[Key, _Entry] = OrderedDict()
        self.of_weight: dict[int, set[Key]] = {}
        # Re-entered where memory that is collected under it holds a key.
        self.lock = threading.RLock()

    def get(self, key: Key, parts: tuple[Tensor, ...], state: State) -> Tensor | None:
        """What was packed from these tensors, if they are in that state still."""
        with self.lock:
            entry = self.entries.get(key)
            if entry is None or not entry.holds(parts, state):
                return None
            self.entries.move_to_end(key)
            return entry.packed

    def put(self, key: Key, parts: tuple[Tensor, ...], state: State, packed: Tensor) -> None:
        """Keeps a packed weight; ``key[2]`` is the identity of the weight, the first of ``parts``."""
        with self.lock:
            self.drop(key)
            if packed.nbytes > self.limit_bytes:
                return
            # What has gone needs no packed copy.
            references = tuple(weakref.ref(part, lambda _: self.drop(key)) for part in parts)
            storages = tuple(StorageWeakRef(_storage(part)) for part in parts)
            self.entries[key] = _Entry(references, storages, state, packed)
            self.of_weight.setdefault(id(parts[0]), set()).add(key)
            self._hold(packed.nbytes)
            self._trim()

    def _hold(self, change: int) -> None:
        self.held_bytes += change
        _C.set_packed_cache_limit(max(0, self.limit_bytes - self.held_bytes))

    def _trim(self) -> None:
        while self.held_bytes > self.limit_bytes:
            self.drop(next(iter(self.entries)))

    def set_limit(self, limit_bytes: int) -> None:
        """Sets the most bytes that are kept, here and in the C++ part."""
        with self.lock:
            self.limit_bytes = limit_bytes
            self._hold(0)
            self._trim()

    def clear(self) -> None:
        """Drops everything, here and in the C++ part."""
        with self.lock:
            for key in list(self.entries):
                self.drop(key)
            _C.clear_packed_cache()

    def info(self) -> dict[str, int]:
        """Counts of the C++ part, with what is held here."""
        with self.lock:
            info = dict(_C.packed_cache_info())
            info["limit_bytes"] = self.limit_bytes
            info["bytes"] += self.held_bytes
            info["entries"] += len(self.entries)
            return info

    def drop(self, key: Key) -> None:
        """Drops one packed weight."""
        with self.lock:
            entry = self.entries.pop(key, None)
            if entry is not None:
                self._hold(-entry.packed.nbytes)
                number = key[2]
                assert isinstance(number, int)
                of_weight = self.of_weight.get(number, set())
                of_weight.discard(key)
                if not of_weight:
                    self.of_weight.pop(number, None)

    def drop_of(self, weight: Tensor) -> None:
        """Drops all that is kept of a weight."""
        if self.entries:
            with self.lock:
                for key in list(self.of_weight.get(id(weight), ())):
                    self.drop(key)


packed_weights = PackedWeights(_C.packed_cache_info()["limit_bytes"])


def drop_packed(tensors: Iterable[Tensor | None]) -> None:
    """Drops what is kept of these weights; others count for nothing."""
    for tensor in tensors:
        if tensor is not None:
            _C.drop_packed(tensor)
            packed_weights.drop_of(tensor)


def count_steps(tensor: Tensor) -> int:
    """Steps of optimisers that the tensor was part of since this was first asked; for tensors that are not compared."""
    return _steps.setdefault(tensor, 0)


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    # The fused steps, and those that are followed by a broadcast, leave the versions of the parameters as they were.
    if torch.compiler.is_compiling():
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    drop_packed(parameters)
    if _steps:
        for parameter in parameters:
            if parameter in _steps:
                _steps[parameter] += 1


# Of all optimisers, those that exist included.
register_optimizer_step_post_hook(_after_step)
