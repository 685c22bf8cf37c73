"""Channel lists as the kernels take them: as they are, or as aligned blocks found once per list.

A list is a run of aligned blocks of b channels where it is [b * c, b * c + 1, ..., b * c + b - 1] for every c of a
shorter list. One look-up then serves b neighbouring channels, which are read in words of 16 bytes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from bap_kernels.triton.weights import capturing

__all__ = ["BLOCKS", "ChannelList", "all_channels", "block_length", "channel_list", "inverse_list"]

# Largest first: fewer look-ups.
BLOCKS = (32, 16, 8)


@dataclass(frozen=True)
class ChannelList:
    """One side's list for a kernel.

    Args:
        entries: channels, or numbers of blocks, int32 and dense; None for all channels.
        kind: the kernels' LIST: 0 no list, 1 a channel an entry, else channels of a block.
        length: number of channels.
    """

    entries: Tensor | None
    kind: int
    length: int


_found: WeakIdKeyDictionary = WeakIdKeyDictionary()


@functools.cache
def all_channels(channels: int, device: torch.device) -> Tensor:
    """The list of all channels, int32, for a run of a mixed batch that has none."""
    # By way of the host: made on the device while a CUDA graph is captured, it would hold nothing.
    return torch.arange(channels, dtype=torch.int32).to(device)


def block_length(channels: list[int], most: int = max(BLOCKS)) -> int:
    """The longest of ``BLOCKS`` up to ``most`` that a list consists of, or 1.

    Examples:
        >>> from bap_kernels.triton.lists import block_length
        >>> block_length([16, 17, 18, 19, 20, 21, 22, 23, 0, 1, 2, 3, 4, 5, 6, 7])
        8
    """
    for b in [b for b in BLOCKS if b <= most]:
        starts = channels[::b]
        whole = len(channels) > 0 and len(channels) % b == 0 and all(s % b == 0 for s in starts)
        if whole and channels == [s + d for s in starts for d in range(b)]:
            return b
    return 1


def channel_list(index: Tensor | None, channels: int, blocks: bool = True, most: int = max(BLOCKS)) -> ChannelList:
    """The kernels' form of a list of the ops.

    A list on a GPU is read on the host once, at its first use, which waits for the device. Lists whose changes cannot
    be seen (inference tensors) and lists first met while a CUDA graph is captured are taken channel by channel.

    Args:
        index: int32, (K,), or None for all ``channels``.
        blocks: if False, no blocks are looked for.
        most: channels of the longest blocks that are looked for.
    """
    if index is None:
        return ChannelList(None, 0, channels)
    if not blocks or index.is_inference():
        return ChannelList(index.contiguous(), 1, index.shape[0])
    version, known = _found.get(index, (None, {}))
    if version == index._version and most in known:
        return known[most]
    if capturing(index):
        return ChannelList(index.contiguous(), 1, index.shape[0])
    b = block_length(index.tolist(), most)
    # A clone, not a view: the cache must not keep its own key alive.
    entries = index.clone(memory_format=torch.contiguous_format) if b == 1 else (index[::b] // b).contiguous()
    found = ChannelList(entries, b, index.shape[0])
    _found[index] = (index._version, {**(known if version == index._version else {}), most: found})
    return found


_places: WeakIdKeyDictionary = WeakIdKeyDictionary()


def inverse_list(index: Tensor, channels: int) -> Tensor:
    """The list turned round: for each of ``channels`` its place in the list, or -1; int32, (channels,).

    Made on the list's device and kept with the list, as long as changes of it can be seen.

    Examples:
        >>> import torch
        >>> from bap_kernels.triton.lists import inverse_list
        >>> inverse_list(torch.tensor([3, 1], dtype=torch.int32), 5).tolist()
        [-1, 1, -1, 0, -1]
    """
    inference = index.is_inference()
    state = None if inference else (index._version, channels)
    known, places = _places.get(index, (None, None))
    if state is not None and known == state:
        return places
    # Tensors made in inference mode cannot be read while gradients are recorded.
    with torch.inference_mode(False):
        places = torch.full((channels,), -1, dtype=torch.int32, device=index.device)
        order = torch.arange(index.shape[0], dtype=torch.int32, device=index.device)
        places.index_copy_(0, index.long(), order)
    # What is made while a CUDA graph is captured is that graph's own.
    if not inference and not capturing(index):
        _places[index] = (state, places)
    return places
