"""Packed weights: the listed slices with the axis of the sums contiguous, and those that layers in eval mode keep."""

from __future__ import annotations

import math
import threading
import weakref
from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakIdKeyDictionary

from bap_kernels._load import _C

__all__ = [
    "ALIGNMENT",
    "alignment",
    "cached_weight",
    "capturing",
    "clear",
    "drop_of",
    "fresh_weight",
    "held_bytes",
    "keep_for_graphs",
    "pack_weight",
    "set_limit",
]

# Elements that a row is rounded up to, so that each starts on 16 bytes and has whole words; the rest is zero.
ALIGNMENT = 16

_Key = tuple[object, ...]
_State = tuple[int, ...]


def pack_weight(weight: Tensor, rows: Tensor | None, columns: Tensor | None, by_input: bool = False) -> Tensor:
    """The listed slices of a weight (C_out, C_in, kH, kW), for a kernel.

    Args:
        rows: listed filters, int32, or None.
        columns: listed input channels, int32, or None.
        by_input: rows of the result are input channels, else filters.

    Returns:
        (K_out, kH * kW, K_in) or, by input, (K_in, kH * kW, K_out); the last axis is rounded up with zeros.
    """
    w = weight if rows is None else weight.index_select(0, rows)
    w = w if columns is None else w.index_select(1, columns)
    w = w.permute(1, 2, 3, 0) if by_input else w.permute(0, 2, 3, 1)
    length = w.shape[3]
    packed = w.new_zeros((w.shape[0], w.shape[1] * w.shape[2], -(-length // ALIGNMENT) * ALIGNMENT))
    packed.view(*w.shape[:3], -1)[..., :length] = w
    return packed


@dataclass(frozen=True)
class _Entry:
    parts: tuple[weakref.ref[Tensor], ...]
    # By weak references, so that another storage cannot get the same address.
    storages: tuple[StorageWeakRef, ...]
    state: _State
    packed: Tensor

    def holds(self, parts: tuple[Tensor, ...], state: _State) -> bool:
        return (
            self.state == state
            # Another tensor may have got the identity of one that is gone.
            and all(ref() is part for ref, part in zip(self.parts, parts, strict=True))
            and all(ref.cdata == _storage(part)._cdata for ref, part in zip(self.storages, parts, strict=True))
        )


def _storage(part: Tensor) -> torch.UntypedStorage:
    return part.untyped_storage()


class _PackedWeights:
    """Least recently used packed weights, up to a number of bytes."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.held_bytes = 0
        self.entries: OrderedDict[_Key, _Entry] = OrderedDict()
        self.of_weight: dict[int, set[_Key]] = {}
        # Re-entered where memory that is collected under it holds a key.
        self.lock = threading.RLock()

    def get(self, key: _Key, parts: tuple[Tensor, ...], state: _State) -> Tensor | None:
        with self.lock:
            entry = self.entries.get(key)
            if entry is None or not entry.holds(parts, state):
                return None
            self.entries.move_to_end(key)
            return entry.packed

    def put(self, key: _Key, parts: tuple[Tensor, ...], state: _State, packed: Tensor) -> None:
        with self.lock:
            self.drop(key)
            if packed.nbytes > self.limit_bytes:
                return
            # What has gone needs no packed copy.
            references = tuple(weakref.ref(part, lambda _: self.drop(key)) for part in parts)
            storages = tuple(StorageWeakRef(_storage(part)) for part in parts)
            self.entries[key] = _Entry(references, storages, state, packed)
            self.of_weight.setdefault(id(parts[0]), set()).add(key)
            self.held_bytes += packed.nbytes
            self.trim()

    def trim(self) -> None:
        with self.lock:
            while self.held_bytes > self.limit_bytes:
                self.drop(next(iter(self.entries)))

    def drop(self, key: _Key) -> None:
        with self.lock:
            entry = self.entries.pop(key, None)
            if entry is not None:
                self.held_bytes -= entry.packed.nbytes
                number = key[2]
                assert isinstance(number, int)
                of_weight = self.of_weight.get(number, set())
                of_weight.discard(key)
                if not of_weight:
                    self.of_weight.pop(number, None)

    def drop_of(self, weight: Tensor) -> None:
        if self.entries:
            with self.lock:
                for key in list(self.of_weight.get(id(weight), ())):
                    self.drop(key)


_packed = _PackedWeights(_C.packed_cache_info()["limit_bytes"])


def cached_weight(weight: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """The packed weight by filters, kept until the weight or a list changes.

    The caller has found that changes of the weight can be seen; see :func:`bap_kernels.clear_packed_cache`.
    """
    parts = tuple(t for t in (weight, rows, columns) if t is not None)
    if any(part.is_inference() for part in parts):
        return pack_weight(weight, rows, columns)
    key = (rows is None, columns is None, *map(id, parts))
    # Parameters change their memory under .to() and load_state_dict(assign=True), which keep the version.
    state = (weight.data_ptr(), *(part._version for part in parts))
    packed = _packed.get(key, parts, state)
    if packed is None:
        packed = pack_weight(weight, rows, columns)
        # What a capture has recorded holds nothing before the graph is replayed.
        if not capturing(weight):
            _packed.put(key, parts, state, packed)
    return packed


def fresh_weight(weight: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """The packed weight by filters, of a call that keeps none: what is kept of the weight is dropped.

    Such calls are those in training mode, those that autograd tracks, and those of weights that something else may
    write to: what they leave may have changed without a trace when the weight is next met.
    """
    drop_of(weight)
    return pack_weight(weight, rows, columns)


def capturing(tensor: Tensor) -> bool:
    """Whether work on the tensor's device is being recorded into a CUDA graph, not done."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


_of_graphs: WeakIdKeyDictionary = WeakIdKeyDictionary()


def keep_for_graphs(weight: Tensor, *parts: Tensor | None) -> None:
    """While a CUDA graph is captured, keeps what its kernels read for as long as the weight lives.

    The graph holds addresses alone: what the caches dropped, for room or because the weight changed, would be memory of
    somebody else. A graph goes on with the weights that it was captured with.
    """
    if capturing(weight):
        held = _of_graphs.setdefault(weight, {})
        held.update({id(part): part for part in parts if part is not None})


def clear() -> None:
    """Drops all packed weights, other than those of captured graphs."""
    with _packed.lock:
        _packed.entries.clear()
        _packed.of_weight.clear()
        _packed.held_bytes = 0


def drop_of(weight: Tensor) -> None:
    """Drops the packed weights of one weight."""
    _packed.drop_of(weight)


def set_limit(limit_bytes: int) -> None:
    """Sets the most bytes that are kept."""
    _packed.limit_bytes = limit_bytes
    _packed.trim()


def held_bytes() -> tuple[int, int]:
    """Bytes and number of the packed weights that are kept."""
    return _packed.held_bytes, len(_packed.entries)


def alignment(*lengths: int) -> int:
    """The largest power of two up to ``ALIGNMENT`` that divides every length; of none, ``ALIGNMENT``.

    Examples:
        >>> from bap_kernels.triton.weights import alignment
        >>> alignment(24, 64)
        8
    """
    return math.gcd(ALIGNMENT, *lengths)
