"""Packed weights: the listed slices with the axis of the sums contiguous, and those that layers in eval mode keep."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from bap_kernels._packed import packed_weights

__all__ = [
    "ALIGNMENT",
    "alignment",
    "cached_weight",
    "capturing",
    "fresh_weight",
    "keep_for_graphs",
    "pack_weight",
]

# Elements that a row is rounded up to, so that each starts on 16 bytes and has whole words; the rest is zero.
ALIGNMENT = 16


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
    packed = packed_weights.get(key, parts, state)
    if packed is None:
        packed = pack_weight(weight, rows, columns)
        # What a capture has recorded holds nothing before the graph is replayed.
        if not capturing(weight):
            packed_weights.put(key, parts, state, packed)
    return packed


def fresh_weight(weight: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """The packed weight by filters, of a call that keeps none: what is kept of the weight is dropped.

    Such calls are those in training mode, those that autograd tracks, and those of weights that something else may
    write to: what they leave may have changed without a trace when the weight is next met.
    """
    packed_weights.drop_of(weight)
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


def alignment(*lengths: int) -> int:
    """The largest power of two up to ``ALIGNMENT`` that divides every length; of none, ``ALIGNMENT``.

    Examples:
        >>> from bap_kernels.triton.weights import alignment
        >>> alignment(24, 64)
        8
    """
    return math.gcd(ALIGNMENT, *lengths)
