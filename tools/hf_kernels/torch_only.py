"""What the launches ask of the compiled library and of settings, in torch alone.

Unlike the library it keeps no packed weights and does not see every change of a list: lists must not be changed.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["PACKED_ALIGNMENT", "check_list", "interpreting", "list_form", "pack_weight", "tune_case"]

# As in csrc/dispatch/pack_weight.h.
PACKED_ALIGNMENT = 16


class _Known(NamedTuple):
    """What was read of a list: its version, least and greatest channel, and its forms by (longest block)."""

    version: int
    least: int
    greatest: int
    distinct: bool
    values: list[int]
    forms: dict[int, tuple[Tensor, int]]


_known: Any = WeakIdKeyDictionary()


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def _capturing(index: Tensor) -> bool:
    return index.is_cuda and torch.cuda.is_current_stream_capturing()


def _read(index: Tensor) -> _Known | None:
    """What is known of a list, which is read on the host once; None where it cannot be read or kept."""
    if index.is_inference():
        return None
    known = _known.get(index)
    if known is not None and known.version == index._version:
        return known
    if _capturing(index):
        return None
    values = index.tolist()
    least, greatest = (min(values), max(values)) if values else (0, -1)
    known = _Known(index._version, least, greatest, len(set(values)) == len(values), values, {})
    _known[index] = known
    return known


def check_list(op: str, name: str, index: Tensor | None, channels: int) -> None:
    """Checks a list, once; lists that cannot be read on the host are not checked.

    Raises:
        IndexError: for channels that are not there.
        ValueError: for channels that are listed twice.
    """
    known = None if index is None else _read(index)
    if known is None:
        return
    if known.least < 0 or known.greatest >= channels:
        raise IndexError(
            f"{op}(): expected `{name}` to hold channels from 0 to {channels - 1}, got {known.least} to "
            f"{known.greatest}."
        )
    if not known.distinct:
        raise ValueError(f"{op}(): expected `{name}` to hold distinct channels, got one twice.")


def _block(values: list[int], most: int) -> int:
    for length in (32, 16, 8):
        if length <= most and values and len(values) % length == 0:
            firsts = values[::length]
            blocks = [first + step for first in firsts for step in range(length)]
            if values == blocks and not any(first % length for first in firsts):
                return length
    return 1


def list_form(
    index: Tensor | None, channels: int, blocks: bool = True, most: int = 32
) -> tuple[Tensor | None, int, int]:
    """A list's entries, kind and length; see ``bap_kernels.triton.lists.ChannelList``."""
    if index is None:
        return None, 0, channels
    known = _read(index) if blocks else None
    if known is None:
        return index.contiguous(), 1, index.shape[0]
    if most not in known.forms:
        block = _block(known.values, most)
        entries = index.detach().clone().contiguous()
        if block > 1:
            entries = entries[::block].div(block, rounding_mode="floor").contiguous()
        known.forms[most] = entries, block
    return (*known.forms[most], index.shape[0])


def pack_weight(weight: Tensor, rows: Tensor | None, columns: Tensor | None, by_input: bool) -> Tensor:
    """(K_out, taps, K_in rounded up) by filters, (K_in, taps, K_out rounded up) by input channels."""
    if rows is not None:
        weight = weight.index_select(0, rows)
    if columns is not None:
        weight = weight.index_select(1, columns)
    weight = weight.permute(1, 2, 3, 0) if by_input else weight.permute(0, 2, 3, 1)
    lines, height, width, length = weight.shape
    padded = -(-length // PACKED_ALIGNMENT) * PACKED_ALIGNMENT
    packed = weight.new_zeros((lines, height, width, padded))
    packed[..., :length] = weight
    return packed.view(lines, height * width, padded)


def tune_case(*case: object) -> None:
    """No tuning: the table of configurations decides."""
