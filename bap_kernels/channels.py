"""The channels that one layer reads and writes in one domain."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch import nn

__all__ = ["ChannelLists"]

_NAMES = ("in_index", "out_index")


def _host_list(name: str, value: Tensor | np.ndarray | Sequence[int]) -> np.ndarray:
    """Checks one list and returns its own int32 copy in host memory."""
    if isinstance(value, Tensor):
        if value.dtype == torch.bool:
            raise TypeError(
                f"ChannelLists(): expected `{name}` to hold channel numbers, got a mask. "
                "Hint: use ChannelLists.from_mask."
            )
        if value.dtype != torch.int32:
            raise TypeError(
                f"ChannelLists(): expected `{name}` to be an int32 tensor, got {value.dtype}. "
                "Hint: convert it with .to(torch.int32)."
            )
        if value.is_meta:
            raise ValueError(
                f"ChannelLists(): expected `{name}` to hold values, got a tensor on the meta device. "
                "Hint: make the lists first, then move them with .to('meta')."
            )
        array = value.detach().cpu().numpy()
    else:
        array = np.asarray(value)
        if array.size == 0:
            array = array.astype(np.int32)
        if array.dtype.kind not in "iu":
            raise TypeError(
                f"ChannelLists(): expected `{name}` to be an int32 tensor or a sequence of ints, got {array.dtype} "
                f"entries. Hint: a mask goes into ChannelLists.from_mask."
            )
    if array.ndim != 1:
        raise ValueError(f"ChannelLists(): expected `{name}` to be 1-D, got {array.ndim} dimensions.")
    if array.size and (array.min() < 0 or array.max() >= 2**31):
        bad = array.min() if array.min() < 0 else array.max()
        raise IndexError(f"ChannelLists(): expected `{name}` to hold channel numbers from 0 to 2**31 - 1, got {bad}.")
    # A copy: a list that was checked must not change afterwards.
    array = array.astype(np.int32)
    if np.any(array[1:] <= array[:-1]):
        raise ValueError(
            f"ChannelLists(): expected `{name}` to be sorted without repeats, got {_short(array)}. "
            "Hint: sort it with torch.unique; gathered_conv2d takes any order."
        )
    return array


def _host_mask(name: str, mask: Tensor | Sequence[Any] | None) -> np.ndarray | None:
    if mask is None:
        return None
    array = mask.detach().cpu().numpy() if isinstance(mask, Tensor) else np.asarray(mask)
    if array.ndim != 1:
        raise ValueError(f"ChannelLists.from_mask(): expected `{name}` to be 1-D, got {array.ndim} dimensions.")
    if not np.all((array == 0) | (array == 1)):
        raise ValueError(f"ChannelLists.from_mask(): expected `{name}` to hold only 0 and 1, got other values.")
    return np.flatnonzero(array).astype(np.int32)


def _short(array: np.ndarray | None) -> str:
    if array is None:
        return "None"
    if array.size <= 8:
        return str(array.tolist())
    return f"[{array[0]}, {array[1]}, ..., {array[-1]}] ({array.size} channels)"


@dataclass(frozen=True, init=False, eq=False, repr=False)
class ChannelLists:
    """Sorted lists of the channels that a layer reads and writes; None stands for all of them.

    The tensors are checked copies and must not be written to. Two objects are equal when they list the same channels,
    on whatever device. Pickled lists come back in host memory; a layer moves its own to the device of its weight.

    Args:
        in_index: channels to read, (K_in,), int32 tensor or sequence of ints, sorted, without repeats; None: all.
        out_index: channels to write, (K_out,), likewise.

    Raises:
        TypeError: for tensors of another dtype than int32, and entries that are no integers.
        ValueError: for lists that are unsorted, have repeats or are not 1-D, and for lists on two devices.
        IndexError: for negative channels.

    Examples:
        >>> from bap_kernels import ChannelLists
        >>> lists = ChannelLists(in_index=[0, 2, 5])
        >>> lists.in_index
        tensor([0, 2, 5], dtype=torch.int32)
        >>> lists == ChannelLists.from_mask(in_mask=[1, 0, 1, 0, 0, 1])
        True
    """

    in_index: Tensor | None = None
    out_index: Tensor | None = None
    # Set on each object, yet no field: torch.compile guards the values of fields that are no tensors, and would compile
    # for every domain. It holds what a move to the meta device would lose.
    _host: ClassVar[tuple[np.ndarray | None, np.ndarray | None]]

    def __init__(
        self,
        in_index: Tensor | np.ndarray | Sequence[int] | None = None,
        out_index: Tensor | np.ndarray | Sequence[int] | None = None,
    ) -> None:
        given = [value for value in (in_index, out_index) if isinstance(value, Tensor)]
        if len({value.device for value in given}) > 1:
            raise ValueError(
                "ChannelLists(): expected `in_index` and `out_index` to be on one device, "
                f"got {given[0].device} and {given[1].device}."
            )
        host = (
            None if in_index is None else _host_list("in_index", in_index),
            None if out_index is None else _host_list("out_index", out_index),
        )
        self._fill(host, given[0].device if given else torch.device("cpu"))

    def _fill(self, host: tuple[np.ndarray | None, np.ndarray | None], device: torch.device) -> None:
        object.__setattr__(self, "_host", host)
        for name, array in zip(_NAMES, host, strict=True):
            object.__setattr__(self, name, None if array is None else torch.from_numpy(array.copy()).to(device))
        self.mark_dynamic()

    def mark_dynamic(self) -> None:
        """Tells torch.compile, where it is loaded, that lengths vary between domains, so that one graph serves all."""
        # Loading it takes seconds, and without torch.compile nothing needs the marks.
        mark = getattr(sys.modules.get("torch._dynamo"), "maybe_mark_dynamic", None)
        if mark is not None:
            for listed in (self.in_index, self.out_index):
                if listed is not None:
                    mark(listed, 0)

    @classmethod
    def _of(cls, host: tuple[np.ndarray | None, np.ndarray | None], device: torch.device) -> ChannelLists:
        lists = object.__new__(cls)
        lists._fill(host, device)
        return lists

    @classmethod
    def from_mask(
        cls, in_mask: Tensor | Sequence[Any] | None = None, out_mask: Tensor | Sequence[Any] | None = None
    ) -> ChannelLists:
        """Lists of the channels where a mask is on.

        Args:
            in_mask: (C_in,), bool or 0 and 1 of any dtype; None keeps all.
            out_mask: (C_out,), likewise.

        Raises:
            ValueError: if a mask is not 1-D or holds other values.
        """
        masks = [mask for mask in (in_mask, out_mask) if isinstance(mask, Tensor)]
        device = masks[0].device if masks else torch.device("cpu")
        return cls._of((_host_mask("in_mask", in_mask), _host_mask("out_mask", out_mask)), device)

    @property
    def counts(self) -> tuple[int | None, int | None]:
        """(K_in, K_out), the number of channels listed; None where all are kept."""
        in_host, out_host = self._host
        return None if in_host is None else in_host.size, None if out_host is None else out_host.size

    def to(self, device: torch.device | str) -> ChannelLists:
        """The same lists on ``device``: this object where they are there already."""
        device = torch.device(device)
        if all(value is None or value.device == device for value in (self.in_index, self.out_index)):
            return self
        return self._of(self._host, device)

    def validate_for(self, conv: nn.Conv2d, name: str = "") -> None:
        """Checks that the lists fit a convolution.

        Args:
            conv: the layer they are meant for.
            name: the layer's name, for the message.

        Raises:
            IndexError: if a list names a channel that the layer does not have.
            ValueError: if the layer is depthwise and the two lists are not the same.
        """
        where = f" of layer {name!r}" if name else ""
        for key, array, channels in zip(_NAMES, self._host, (conv.in_channels, conv.out_channels), strict=True):
            if array is not None and array.size and array[-1] >= channels:
                raise IndexError(
                    f"ChannelLists.validate_for(): expected `{key}`{where} to hold channel numbers from 0 to "
                    f"{channels - 1}, got {array[-1]}."
                )
        in_bytes, out_bytes = self._key
        if conv.groups != 1 and in_bytes != out_bytes:
            raise ValueError(
                f"ChannelLists.validate_for(): expected `out_index`{where} to equal `in_index`, as the layer is "
                f"depthwise, got {self!r}."
            )

    @property
    def _key(self) -> tuple[bytes | None, bytes | None]:
        in_host, out_host = self._host
        return None if in_host is None else in_host.tobytes(), None if out_host is None else out_host.tobytes()

    def __eq__(self, other: object) -> bool:
        return self._key == other._key if isinstance(other, ChannelLists) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        return f"ChannelLists(in_index={_short(self._host[0])}, out_index={_short(self._host[1])})"

    def __deepcopy__(self, memo: dict[int, Any]) -> ChannelLists:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return ChannelLists._of, (self._host, torch.device("cpu"))
