"""Gathers of the kept channels in PyTorch's own operations; all keep the memory format."""

from collections.abc import Callable

import torch
from torch import Tensor

Gather = Callable[[Tensor], Tensor]


def planes(index: Tensor) -> Gather:
    """Copy whole planes of an NCHW tensor: contiguous runs of H W elements."""
    return lambda x: x.index_select(1, index)


def pixels(index: Tensor) -> Gather:
    """Select along the last axis of the NHWC view."""
    return lambda x: x.permute(0, 2, 3, 1).index_select(3, index).permute(0, 3, 1, 2)


def rows(index: Tensor) -> Gather:
    """Select columns of the matrix (N H W, C)."""

    def run(x: Tensor) -> Tensor:
        N, C, H, W = x.shape
        matrix = x.permute(0, 2, 3, 1).reshape(-1, C)
        return matrix.index_select(1, index).view(N, H, W, -1).permute(0, 3, 1, 2)

    return run


def expanded(index: Tensor) -> Gather:
    """``torch.gather`` on the matrix (N H W, C) with the list expanded over its rows."""
    index = index.long()

    def run(x: Tensor) -> Tensor:
        N, C, H, W = x.shape
        matrix = x.permute(0, 2, 3, 1).reshape(-1, C)
        return matrix.gather(1, index.expand(len(matrix), -1)).view(N, H, W, -1).permute(0, 3, 1, 2)

    return run


def flat(index: Tensor, shape: torch.Size) -> Gather:
    """``torch.take`` with precomputed positions of the kept elements."""
    N, C, H, W = shape
    positions = torch.arange(N * H * W, device=index.device)[:, None] * C + index.long()
    return lambda x: torch.take(x.permute(0, 2, 3, 1), positions).view(N, H, W, -1).permute(0, 3, 1, 2)


def subsampled(gather: Gather, stride: int) -> Gather:
    """Gather only the pixels that a strided 1x1 convolution reads."""
    return lambda x: gather(x[:, :, ::stride, ::stride])


def alternatives(index: Tensor, layout: str, example: Tensor) -> dict[str, Gather]:
    """All gathers for a memory format; the example is an input of the cell."""
    if layout == "nchw":
        return {"planes": planes(index)}
    return {
        "pixels": pixels(index),
        "rows": rows(index),
        "expanded": expanded(index),
        "take": flat(index, example.shape),
    }
