"""Whether a tensor's numbers can be read where they are, and how often they were written."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["holds_values", "version_of"]


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


def version_of(tensor: Tensor) -> int:
    """PyTorch's count of the writes to a tensor; -1 where it counts none.

    It does not for tensors of inference mode, nor for one that was made there and has been given other data since.
    """
    if tensor.is_inference():
        return -1
    try:
        return tensor._version
    except RuntimeError:
        return -1
