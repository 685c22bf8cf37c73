"""Ways in which PyTorch runs a convolution whose weight is known beforehand; packing is outside the timing."""

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
    """``F.conv2d``; oneDNN may reorder the weight in each call."""
    return lambda x: F.conv2d(x, weight, None, stride, padding)


def prepacked(weight: Tensor, stride: int, padding: int, example: Tensor) -> Conv:
    """Run oneDNN's convolution on a weight that was reordered for the example's shape; result in the input's format."""
    pair_stride, pair_padding, pair_one = [stride, stride], [padding, padding], [1, 1]
    packed = torch.ops.mkldnn._reorder_convolution_weight(
        weight, pair_padding, pair_stride, pair_one, 1, list(example.shape)
    )

    def run(x: Tensor) -> Tensor:
        return torch.ops.mkldnn._convolution_pointwise(
            x, packed, None, pair_padding, pair_stride, pair_one, 1, "none", [], ""
        )

    if example.is_contiguous(memory_format=torch.channels_last):
        return run
    # The fused op answers in channels_last whatever it is given.
    return lambda x: run(x).contiguous()


def matmul(weight: Tensor, layout: str) -> Conv:
    """Run a 1x1 convolution with stride 1 as one matrix product over all pixels."""
    matrix = weight.flatten(1).contiguous()
    K_out = matrix.shape[0]
    if layout == "channels_last":
        transposed = matrix.t().contiguous()

        def run(x: Tensor) -> Tensor:
            return torch.matmul(x.permute(0, 2, 3, 1), transposed).permute(0, 3, 1, 2)
    else:

        def run(x: Tensor) -> Tensor:
            N, _, H, W = x.shape
            return torch.matmul(matrix, x.flatten(2)).view(N, K_out, H, W)

    return run


def alternatives(weight: Tensor, stride: int, padding: int, layout: str, example: Tensor) -> dict[str, Conv]:
    """Collect all ways that apply; the example is a compact input in the cell's memory format."""
    found = {"conv2d": plain(weight, stride, padding)}
    if can_prepack(weight):
        found["prepacked"] = prepacked(weight, stride, padding, example)
    if weight.shape[2:] == (1, 1) and stride == 1:
        found["matmul"] = matmul(weight, layout)
    return found
