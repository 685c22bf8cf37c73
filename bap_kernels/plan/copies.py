"""Where a convolution stores, beside its result, what one later convolution reads of it, densely.

In a residual network the stream carries what all later layers read, and the next convolution wants some of it. Per
pixel, counted in channels, with `kept` that are read, of sectors that hold `touched`:

    gathered first     touched are read, kept are written and read again
    gathered in place  touched are read
    stored twice       kept are written, in the launch that writes the stream, and kept are read

So a second store is cheaper where the list would be gathered first, and where 2 * kept < touched. It never is where a
list costs nothing: in NCHW, where it stands on the strided axis; where it consists of whole aligned blocks; and on
CPUs, whose kernels gather inside their tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from bap_kernels._load import _C
from bap_kernels.plan.fuse import Group
from bap_kernels.plan.graph import Channels, Op, Value
from bap_kernels.plan.layout import Layout

__all__ = ["Copy", "cheaper", "copies", "stored_reads"]

# Bytes that a GPU reads at least, and channels that the kernels read by one look-up in a list.
_SECTOR, _BLOCK = 32, 8


@dataclass(frozen=True)
class Copy:
    """A second store of a value.

    Args:
        positions: which of the stored channels, in order.
        reader: the convolution that it is for.
    """

    positions: Channels
    reader: Group


def stored_reads(group: Group, layout: Layout) -> tuple[Channels, Channels | None]:
    """(channels that a convolution reads, in order; their positions among the stored ones).

    The positions are None where some of the channels are constants, which are not stored.
    """
    constant, stored = layout.constant[group.source], layout.stored[group.source]
    sources = group.conv.reads
    # A zero channel adds nothing; another constant is read like any channel, for its sum ends at the borders.
    read = sources[~(constant[sources] == 0)]
    if not np.isnan(constant[read]).all():
        return read, None
    place = np.full(len(constant), -1)
    place[stored] = np.arange(len(stored))
    positions = np.sort(place[read])
    return stored[positions], positions


def _in_blocks(positions: Channels) -> bool:
    if len(positions) % _BLOCK:
        return False
    blocks = positions.reshape(-1, _BLOCK)
    return bool((blocks[:, 0] % _BLOCK == 0).all() and (np.diff(blocks) == 1).all())


def cheaper(positions: Channels, taps: int, itemsize: int, memory_format: torch.memory_format, backend: str) -> bool:
    """Whether a second store costs less than reading through a list.

    Args:
        positions: of the listed channels among the stored ones.
        taps: of the convolution that reads them.
        itemsize: bytes of an element.
        memory_format: of the stored tensor.
        backend: that runs it, as :func:`bap_kernels.use_backend` names it.

    Examples:
        >>> import numpy as np, torch
        >>> from bap_kernels.plan.copies import cheaper
        >>> half = np.arange(0, 64, 2)
        >>> cheaper(half, 1, 2, torch.channels_last, "triton")
        True
        >>> cheaper(half, 1, 2, torch.contiguous_format, "triton")
        False
        >>> cheaper(half, 1, 2, torch.channels_last, "native")
        False
    """
    if backend not in ("cuda", "triton") or memory_format != torch.channels_last or _in_blocks(positions):
        return False
    # The kernel with a halo, and products of 4 bytes without a copy to shared memory: see the routes of the backends.
    in_place = taps > 1 if backend == "cuda" else taps == 1 and itemsize == 4
    touched = len(np.unique(positions // (_SECTOR // itemsize))) * (_SECTOR // itemsize)
    return not in_place or 2 * len(positions) < touched


def copies(
    fused: dict[Op, Group | None], layout: Layout, memory_format: torch.memory_format, backend: str | None = None
) -> dict[Value, Copy]:
    """The results of convolutions that are to be stored twice; ``backend`` is by default the one that is named."""
    groups = {group.last.output: group for group in fused.values() if group is not None}
    readers: dict[Value, list[Group]] = {}
    for group in groups.values():
        readers.setdefault(group.source, []).append(group)
    found = {}
    for value, (reader, *others) in readers.items():
        producer = groups.get(value)
        if others or producer is None or (producer.conv.kind, reader.conv.kind) != ("conv", "conv"):
            continue
        _, positions = stored_reads(reader, layout)
        stored = layout.stored[value]
        if positions is None or not 0 < len(positions) < len(stored) or not layout.live[reader.last.output].any():
            continue
        assert isinstance(reader.conv.module, nn.Conv2d)
        assert value.dtype is not None
        taps, name = int(np.prod(reader.conv.module.kernel_size)), backend or _C.get_backend()
        if cheaper(positions, taps, value.dtype.itemsize, memory_format, name):
            found[value] = Copy(positions, reader)
    return found
