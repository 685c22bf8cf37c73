"""When a convolution stores, beside its result, a compact copy of what one later convolution reads of it.

In a residual network the stream holds what all later layers read, and the next convolution reads some of it. Channels
moved per pixel, with `kept` channels that are read, in memory sectors that hold `touched`:

    gather first        touched are read, kept are written and read again
    gather in place     touched are read
    dual store          kept are written, in the launch that writes the stream, and kept are read

So a dual store is cheaper where the list would be gathered first, and where 2 * kept < touched. It never is where a
list costs nothing: in NCHW, where it stands on the strided axis; where it consists of whole aligned blocks; and on
CPUs, whose kernels gather inside their tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from bap_kernels._load import _C
from bap_kernels.flow.graph import Channels, Op, Value
from bap_kernels.plan.fuse import FusedConv
from bap_kernels.plan.layout import Layout

__all__ = ["DualStore", "dual_store_pays", "dual_stores", "stored_reads"]

# Bytes that a GPU reads at least, and channels that the kernels read by one look-up in a list.
_SECTOR, _BLOCK = 32, 8


@dataclass(frozen=True)
class DualStore:
    """A second, compact store of a value.

    Args:
        positions: which of the stored channels, in order.
        consumer: the convolution that reads it.
    """

    positions: Channels
    consumer: FusedConv


def stored_reads(fused: FusedConv, layout: Layout) -> tuple[Channels, Channels | None]:
    """(channels that a convolution reads, in order; their positions among the stored ones).

    The positions are None where some of the channels are constants, which are not stored.
    """
    constant, stored = layout.constant[fused.source], layout.stored[fused.source]
    listed = fused.conv.reads
    # A zero channel adds nothing; another constant is read like any channel, as its sum depends on the borders.
    read = listed[~(constant[listed] == 0)]
    if not np.isnan(constant[read]).all():
        return read, None
    positions = np.sort(layout.positions(fused.source)[read])
    return stored[positions], positions


def _in_blocks(positions: Channels) -> bool:
    if len(positions) % _BLOCK:
        return False
    blocks = positions.reshape(-1, _BLOCK)
    return bool((blocks[:, 0] % _BLOCK == 0).all() and (np.diff(blocks) == 1).all())


def dual_store_pays(
    positions: Channels, taps: int, itemsize: int, memory_format: torch.memory_format, backend: str
) -> bool:
    """Whether a dual store costs less than reading through a list.

    Args:
        positions: of the listed channels among the stored ones.
        taps: of the convolution that reads them.
        itemsize: bytes of an element.
        memory_format: of the stored tensor.
        backend: that runs it, as :func:`bap_kernels.use_backend` names it.

    Examples:
        >>> import numpy as np, torch
        >>> from bap_kernels.plan.dual_store import dual_store_pays
        >>> half = np.arange(0, 64, 2)
        >>> dual_store_pays(half, 1, 2, torch.channels_last, "triton")
        True
        >>> dual_store_pays(half, 1, 2, torch.contiguous_format, "triton")
        False
        >>> dual_store_pays(half, 1, 2, torch.channels_last, "native")
        False
    """
    if backend not in ("cuda", "triton") or memory_format != torch.channels_last or _in_blocks(positions):
        return False
    # CUDA's kernel with a halo and Triton's 4-byte products read through the list without gathering first.
    in_place = taps > 1 if backend == "cuda" else taps == 1 and itemsize == 4
    touched = len(np.unique(positions // (_SECTOR // itemsize))) * (_SECTOR // itemsize)
    return not in_place or 2 * len(positions) < touched


def dual_stores(
    fused: dict[Op, FusedConv | None], layout: Layout, memory_format: torch.memory_format
) -> dict[Value, DualStore]:
    """The results of convolutions that are to be stored twice by the backend that is active."""
    convs = {conv.last.output: conv for conv in fused.values() if conv is not None}
    consumers: dict[Value, list[FusedConv]] = {}
    for conv in convs.values():
        consumers.setdefault(conv.source, []).append(conv)
    stores = {}
    for value, (consumer, *others) in consumers.items():
        producer = convs.get(value)
        if others or producer is None or (producer.conv.kind, consumer.conv.kind) != ("conv", "conv"):
            continue
        _, positions = stored_reads(consumer, layout)
        stored = layout.stored[value]
        if positions is None or not 0 < len(positions) < len(stored) or not layout.live[consumer.last.output].any():
            continue
        assert value.dtype is not None
        taps = int(np.prod(consumer.conv.conv.kernel_size))
        if dual_store_pays(positions, taps, value.dtype.itemsize, memory_format, _C.get_backend()):
            stores[value] = DualStore(positions, consumer)
    return stores
