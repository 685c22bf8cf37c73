"""From a pruning mask of one layer to its lists, and what the mask zeroes beyond what lists can say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bap_kernels.channels import ChannelLists

__all__ = ["MaskLists", "Widths", "layer_of_key", "lists_of_mask", "refuse_other_than_masks"]

# (C_in, C_out) of the layer that a mask was made for; None where the mask does not tell.
Widths = tuple[int | None, int | None]

# What tools append to a layer's name in their files.
_PARAMETER_SUFFIXES = (".weight", ".weight_mask")


class MaskLists(NamedTuple):
    """What a mask says of one layer.

    Attributes:
        lists: the channels that it keeps.
        note: the same in words.
        widths: those of its layer.
        beyond: how many numbers it zeroes that the lists leave in use; where the model is known, only those that are
            not zero in it.
    """

    lists: ChannelLists
    note: str
    widths: Widths
    beyond: int


def refuse_other_than_masks(masks: Any) -> None:
    """Checks the two levels of names."""
    expected = "ChannelTable.from_masks(): expected `masks` to be a mapping {domain: {layer: mask}}"
    if not isinstance(masks, Mapping):
        raise TypeError(f"{expected}, got {type(masks).__name__}.")
    if not masks:
        raise ValueError(f"{expected}, got no domain.")
    for domain, layers in masks.items():
        if not isinstance(domain, str) or not isinstance(layers, Mapping):
            hint = " Hint: masks of one network go into {'default': masks}." if isinstance(layers, Tensor) else ""
            raise TypeError(f"{expected}, got {domain!r}: {type(layers).__name__}.{hint}")
        for key in layers:
            if not isinstance(key, str):
                raise TypeError(f"{expected}, got {key!r} for the name of a layer in domain {domain!r}.")


def layer_of_key(key: str) -> str:
    """The layer's name in that of its weight, or of the weight's mask."""
    return next((key.removesuffix(end) for end in _PARAMETER_SUFFIXES if key.endswith(end)), key)


def _binary(where: str, mask: Any) -> np.ndarray:
    """A mask as booleans on the host, (C_in,) or (C_out, C_in, kH, kW)."""
    if isinstance(mask, Tensor) and mask.is_meta:
        raise ValueError(
            f"ChannelTable.from_masks(): expected `masks` to hold values, got a tensor on the meta device {where}."
        )
    try:
        values = torch.as_tensor(mask).detach().cpu()
        values = values if values.layout == torch.strided else values.to_dense()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            "ChannelTable.from_masks(): expected `masks` to hold tensors, arrays or sequences of numbers, got "
            f"{type(mask).__name__} {where}: {error}"
        ) from error
    if values.dim() not in (1, 4) or values.numel() == 0:
        raise ValueError(
            "ChannelTable.from_masks(): expected `masks` to have the shape (C_in,) or that of a weight "
            f"(C_out, C_in, kH, kW), got {tuple(values.shape)} {where}."
        )
    odd = values[(values != 0) & (values != 1)]
    if odd.numel():
        raise ValueError(
            f"ChannelTable.from_masks(): expected `masks` to hold 0 and 1 only, got {odd.flatten()[0].item()} {where}. "
            "Hint: compare scores with their threshold first; lists of channel numbers go into ChannelLists."
        )
    present: np.ndarray = (values != 0).numpy()
    return present


def _fitting(where: str, mask: np.ndarray, conv: nn.Module | None, known: list[str]) -> np.ndarray:
    """The mask in the shape of the layer that it is for, axes of length 1 repeated."""
    if not isinstance(conv, nn.Conv2d):
        got = "no such layer" if conv is None else f"a {type(conv).__name__}"
        hint = f" Hint: they are {', '.join(known[:4])}{', ...' * (len(known) > 4)}." if known else ""
        raise ValueError(
            f"ChannelTable.from_masks(): expected `masks` to name convolutions of `model`, got {got} {where}.{hint}"
        )
    shapes = ((conv.in_channels,), (conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size))
    if mask.shape == shapes[0]:
        return mask
    if mask.ndim == 4 and all(size in (1, full) for size, full in zip(mask.shape, shapes[1], strict=True)):
        return np.broadcast_to(mask, shapes[1])
    hint = " Hint: a mask of filters needs the weight's shape." if mask.shape == (conv.out_channels,) else ""
    raise ValueError(
        f"ChannelTable.from_masks(): expected `masks` to have the shape {shapes[0]} or {shapes[1]} {where}, "
        f"got {tuple(mask.shape)}.{hint}"
    )


def _numbers(module: nn.Module | None, name: str) -> np.ndarray | None:
    """Where a parameter is not zero; None where that is not known."""
    value = getattr(module, name, None)
    if not isinstance(value, Tensor) or value.is_meta:
        return None
    present: np.ndarray = (value.detach() != 0).cpu().numpy()
    return present


def _of_input_channels(where: str, mask: np.ndarray, conv: nn.Module | None, both: bool) -> MaskLists:
    note = f"reads {np.count_nonzero(mask)} of {len(mask)}"
    kept = None if mask.all() else np.flatnonzero(mask)
    if kept is None or not isinstance(conv, nn.Conv2d) or conv.groups == 1:
        return MaskLists(ChannelLists(kept), note, (len(mask), None), 0)
    if not both or not conv.groups == conv.in_channels == conv.out_channels:
        raise ValueError(
            f"ChannelTable.from_masks(): expected `masks` to leave all channels of a layer with groups={conv.groups}, "
            f"got one that keeps {len(kept)} of {len(mask)} {where}. Hint: mask the layer that reads its result, "
            "which tells what is needed of this one."
        )
    bias = _numbers(conv, "bias")
    beyond = 0 if bias is None else np.count_nonzero(bias & ~mask)
    return MaskLists(ChannelLists(kept, kept), note, (len(mask), len(mask)), int(beyond))


def _of_weights(mask: np.ndarray, conv: nn.Module | None, both: bool) -> MaskLists:
    depthwise = isinstance(conv, nn.Conv2d) and conv.groups == conv.in_channels == conv.out_channels != 1
    reads, writes = np.asarray(mask.any(axis=(0, 2, 3))), np.asarray(mask.any(axis=(1, 2, 3)))
    if depthwise:
        reads = writes if both else np.ones_like(writes)
    note = f"reads {np.count_nonzero(reads)} of {len(reads)}"
    if not writes.all():
        note += f"; {np.count_nonzero(~writes)} of {len(writes)} filters are masked"
        note += "" if both else ", which has no effect without `both`"
    in_use = np.broadcast_to(writes[:, None, None, None] | (not both), mask.shape)
    if not depthwise:
        in_use = in_use & reads[None, :, None, None]
    masked = in_use & ~mask
    single = np.count_nonzero(masked & writes[:, None, None, None])
    if single:
        note += f"; {single} single weights are masked, which has no effect"
    weight = _numbers(conv, "weight")
    beyond = np.count_nonzero(masked if weight is None or weight.shape != mask.shape else masked & weight)
    bias = _numbers(conv, "bias")
    if both and bias is not None:
        # An out-list leaves out the bias, too, which the mask of a weight keeps.
        beyond += np.count_nonzero(bias & ~writes)
    widths = tuple(None if size == 1 else size for size in (mask.shape[1], mask.shape[0]))
    lists = ChannelLists(
        None if reads.all() else np.flatnonzero(reads), None if writes.all() or not both else np.flatnonzero(writes)
    )
    return MaskLists(lists, note, (None if depthwise else widths[0], widths[1]), int(beyond))


def lists_of_mask(
    domain: str, layer: str, mask: Any, both: bool, modules: Mapping[str, nn.Module] | None = None
) -> MaskLists:
    """The lists of one layer.

    Args:
        domain, layer: for messages, and to find the layer.
        mask: (C_in,) or (C_out, C_in, kH, kW), of 0 and 1.
        both: whether filters that are masked whole become an out-list.
        modules: those of the model, if there is one.

    Raises:
        TypeError, ValueError: as :meth:`bap_kernels.ChannelTable.from_masks`.
    """
    where = f"for layer {layer!r} in domain {domain!r}"
    values = _binary(where, mask)
    conv = None
    if modules is not None:
        conv = modules.get(layer)
        known = [name for name, module in modules.items() if isinstance(module, nn.Conv2d)]
        values = _fitting(where, values, conv, known)
    return _of_input_channels(where, values, conv, both) if values.ndim == 1 else _of_weights(values, conv, both)
