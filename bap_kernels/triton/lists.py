"""Channel lists as the kernels take them: as they are, or as aligned blocks found once per list.

A list is a run of aligned blocks of b channels where it is [b * c, b * c + 1, ..., b * c + b - 1] for every c of a
shorter list. One look-up then serves b neighbouring channels, which are read in 128-bit vectors.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from bap_kernels._load import _C

__all__ = ["ChannelList", "channel_list"]


class ChannelList(NamedTuple):
    """One side's list for a kernel.

    Args:
        entries: channels, or numbers of blocks, int32 and dense; None for all channels.
        kind: the kernels' LIST: 0 no list, 1 a channel an entry, else channels of a block: 8, 16 or 32.
        length: number of channels.
    """

    entries: Tensor | None
    kind: int
    length: int


def channel_list(index: Tensor | None, channels: int, blocks: bool = True, most: int = 32) -> ChannelList:
    """The kernels' form of a list of the ops, kept with the list.

    A list on a GPU is read on the host once, at its first use, which waits for the device. Lists whose changes cannot
    be seen (inference tensors) and lists first met while a CUDA graph is captured are taken channel by channel.

    Args:
        index: int32, (K,), or None for all ``channels``.
        blocks: if False, no blocks are looked for.
        most: channels of the longest blocks that are looked for.

    Examples:
        >>> import torch
        >>> from bap_kernels.triton.lists import channel_list
        >>> index = torch.tensor([16, 17, 18, 19, 20, 21, 22, 23, 0, 1, 2, 3, 4, 5, 6, 7], dtype=torch.int32)
        >>> channel_list(index, 32)
        ChannelList(entries=tensor([2, 0], dtype=torch.int32), kind=8, length=16)
    """
    return ChannelList(*_C.list_form(index, channels, blocks, most))
