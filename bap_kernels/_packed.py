"""Events after which packed weights are dropped, whatever their tensors say: steps of optimisers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from bap_kernels._load import _C

__all__ = ["count_steps", "drop_packed"]

# Steps of optimisers that each watched tensor was part of.
_steps: WeakIdKeyDictionary = WeakIdKeyDictionary()


def drop_packed(tensors: Iterable[Tensor | None]) -> None:
    """Drops what is kept of these weights; others count for nothing."""
    for tensor in tensors:
        if tensor is not None:
            _C.drop_packed(tensor)


def count_steps(tensor: Tensor) -> int:
    """Steps of optimisers that the tensor was part of since this was first asked; for tensors that are not compared."""
    return _steps.setdefault(tensor, 0)


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    # The fused steps, and those that are followed by a broadcast, leave the versions of the parameters as they were.
    if torch.compiler.is_compiling():
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    drop_packed(parameters)
    if _steps:
        for parameter in parameters:
            if parameter in _steps:
                _steps[parameter] += 1


# Of all optimisers, those that exist included.
register_optimizer_step_post_hook(_after_step)
