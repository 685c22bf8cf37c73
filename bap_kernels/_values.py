"""Whether a tensor's numbers can be read where they are."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["holds_values"]


def holds_values(tensor: Tensor) -> bool:
    """Whether a tensor has memory of its own.

    Not so: tensors on the meta device, sparse ones, those that a transform of :mod:`torch.func` maps over, and
    subclasses that stand for other tensors, as distributed and quantised weights do. Native code must not read these.

    Examples:
        >>> import torch
        >>> from bap_kernels._values import holds_values
        >>> holds_values(torch.ones(2)), holds_values(torch.ones(2, device="meta"))
        (True, False)
    """
    if tensor.layout != torch.strided or tensor.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return False
    if type(tensor) in (Tensor, nn.Parameter):
        return True
    try:
        return tensor.numel() == 0 or tensor.untyped_storage().data_ptr() != 0
    except (RuntimeError, NotImplementedError):  # it has no storage
        return False
