"""Means of whole images, as most classifiers have them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bap_kernels.flow.ops import Call

__all__ = ["global_average", "is_global_average"]

# Beyond, the kernel for any window is the slower one.
_MOST_PIXELS = 256


def is_global_average(call: Any) -> bool:
    """Whether a call of one tensor is ``F.adaptive_avg_pool2d(x, 1)``, as a function or a layer."""
    if not isinstance(call, Call):
        return False
    if isinstance(call.target, nn.AdaptiveAvgPool2d):
        size = call.target.output_size
    elif call.target is F.adaptive_avg_pool2d:
        sizes = (*call.args, *call.kwargs.values())
        size = sizes[0] if len(sizes) == 1 else None
    else:
        return False
    return size == 1 or (isinstance(size, (tuple, list)) and tuple(size) == (1, 1))


def global_average(x: Tensor) -> Tensor:
    """The mean of each image, (N, C, H, W) -> (N, C, 1, 1).

    PyTorch's pooling of a window starts in a third of the time of its reduction, which counts between the layers of a
    network.
    """
    if torch.compiler.is_compiling():
        return F.adaptive_avg_pool2d(x, 1)  # for any size of images
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    if last and x.device.type == "cpu" and x.dtype == torch.float32 and 0 < x.shape[2] * x.shape[3] <= _MOST_PIXELS:
        return F.avg_pool2d(x, x.shape[2:])
    return F.adaptive_avg_pool2d(x, 1)
