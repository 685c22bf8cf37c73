"""Memory with borders: every buffer of a call lies between NaN, which must reach no result and must stay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["BORDER_BYTES", "Guards"]

BORDER_BYTES = 512  # a multiple of every alignment that kernels ask for
_FACTORIES = frozenset(
    ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "zeros", "zeros_like", "new_zeros")
)
_FAR = 2**30


class Guards(TorchDispatchMode):
    """Puts borders around tensors that it is given, and while it is active around all that are made.

    Also around those that C++ code makes: results, partial sums, packed weights, compact copies.

    Args:
        device: of the tensors.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self._key = torch._C.DispatchKeySet(
            torch._C.DispatchKey.CUDA if device.type == "cuda" else torch._C.DispatchKey.CPU
        )
        self._memory: list[tuple[Tensor, int, str]] = []
        self._given: list[tuple[Tensor, Tensor, str]] = []

    def place(self, value: Any, name: str = "an argument") -> Any:
        """A copy on the device, with its strides, of a tensor or of those in a list or tuple; before it is active."""
        if isinstance(value, (list, tuple)):
            return type(value)(self.place(each, name) for each in value)
        if not isinstance(value, Tensor):
            return value
        count = value.untyped_storage().nbytes() // value.element_size()
        storage = value.detach().as_strided((count,), (1,), 0)
        flat, border = self._flat(count, value.dtype, name)
        flat[border : border + count] = storage.to(self.device)
        self._given.append((flat, flat.clone(), name))
        return flat.as_strided(value.shape, value.stride(), border + value.storage_offset())

    def check(self) -> str | None:
        """What was written that must not be; None if nothing was."""
        for flat, before, name in self._given:
            if not torch.equal(_bits(flat), _bits(before)):
                return f"{name} or the memory around it was written to"
        for flat, border, name in self._memory:
            ends = torch.cat([flat[:border], flat[flat.numel() - border :]])
            if not torch.equal(_bits(ends), _bits(_filling(ends))):
                return f"memory around {name} was written to"
        return None

    def _flat(self, count: int, dtype: torch.dtype, name: str) -> tuple[Tensor, int]:
        border = BORDER_BYTES // dtype.itemsize
        flat = torch.empty(count + 2 * border, dtype=dtype, device=self.device)
        flat.copy_(_filling(flat))
        self._memory.append((flat, border, name))
        return flat, border

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "bap_kernels":
            # From here on the mode is off; what the op does on its device is to be seen, too.
            with self:
                return func.redispatch(self._key, *args, **kwargs)
        result = func(*args, **kwargs)
        if func._schema.name.rpartition("::")[2] not in _FACTORIES or not isinstance(result, Tensor):
            return result
        # The library's own copies of lists are taken by their storage.
        if result.device.type != self.device.type or result.numel() == 0 or not result.dtype.is_floating_point:
            return result
        count = 1 + sum((n - 1) * stride for n, stride in zip(result.shape, result.stride(), strict=True))
        flat, border = self._flat(count, result.dtype, f"a tensor {tuple(result.shape)}")
        placed = flat.as_strided(result.shape, result.stride(), border)
        return placed.copy_(result) if "zeros" in func._schema.name else placed


def _filling(like: Tensor) -> Tensor:
    if like.dtype.is_floating_point:
        return torch.full_like(like, torch.nan)
    # As a channel or an offset, beyond everything.
    return torch.full_like(like, _FAR if like.dtype.itemsize >= 4 else 1)


def _bits(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.uint8)
