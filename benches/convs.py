"""Implementations of a convolution in PyTorch with a fixed weight; packing is outside the timing."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Conv = Callable[[Tensor], Tensor]


def can_prepack(weight: Tensor) -> bool:
    """Whether oneDNN's prepacked convolution exists for this device and dtype."""
    return (
        weight.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_convolution_weight")
        and (
            weight.dtype == torch.float32
            or (weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
        )
    )


def plain(weight: Tensor, stride: int, padding: int) -> Conv:
    """``F.conv2d``; oneDNN may reorder the weight in every call."""
    return lambda x: F.conv2d(x, weight, None, stride, padding)


def prepacked(weight: Tensor, stride: int, padding: int, example: Tensor) -> Conv:
    """OneDNN's convolution with a weight reordered for the example's shape; the result has the input's format."""
    geometry = [padding] * 2, [stride] * 2, [1, 1], 1
    packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry, list(example.shape))

    def run(x: Tensor) -> Tensor:
        return torch.ops.mkldnn._convolution_pointwise(x, packed, None, *geometry, "none", [], "")

    if example.is_contiguous(memory_format=torch.channels_last):
        return run
    # The fused op always returns channels_last.
    return lambda x: run(x).contiguous()


def matmul(weight: Tensor, layout: str) -> Conv:
    """A 1x1 convolution with stride 1 as one matrix product over all pixels."""
    matrix = weight.flatten(1).contiguous()
    if layout == "channels_last":
        transposed = matrix.t().contiguous()
        return lambda x: torch.matmul(x.permute(0, 2, 3, 1), transposed).permute(0, 3, 1, 2)
    return lambda x: torch.matmul(matrix, x.flatten(2)).view(len(x), -1, *x.shape[2:])


def alternatives(weight: Tensor, stride: int, padding: int, layout: str, example: Tensor) -> dict[str, Conv]:
    """Return the implementations that apply; the example is a compact input in the cell's memory format."""
    convs = {"conv2d": plain(weight, stride, padding)}
    if can_prepack(weight):
        convs["prepacked"] = prepacked(weight, stride, padding, example)
    if weight.shape[2:] == (1, 1) and stride == 1:
        convs["matmul"] = matmul(weight, layout)
    return convs
