"""Bytes that a swapped or planned network holds."""

from __future__ import annotations

from torch import nn

from bap_kernels._arguments import check_module
from bap_kernels.plan.held import NetworkMemory, layer_uses, network_memory
from bap_kernels.plan.planned import PlannedNetwork

__all__ = ["memory"]


def memory(model: nn.Module) -> NetworkMemory:
    """Counts the bytes that a network holds now: parameters, packed weights of its domains, what plans copy.

    Args:
        model: a swapped network, or a planned one, whose activations are counted, too.

    Examples:
        >>> import torch, bap_kernels as bk
        >>> model = bk.swap_(torch.nn.Sequential(torch.nn.Conv2d(64, 32, 3, bias=False))).eval()
        >>> bk.memory(model).parameters
        73728
        >>> planned = bk.plan(model, torch.randn(1, 64, 8, 8))
        >>> bk.memory(planned).activations  # 64 channels of 8 x 8 pixels and 32 of 6 x 6
        20992
    """
    check_module("memory", model)
    return model.memory() if isinstance(model, PlannedNetwork) else network_memory(model, layer_uses(model))
