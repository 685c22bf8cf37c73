"""Wide residual networks with pre-activation (Zagoruyko and Komodakis, 2016): WRN-28-4 by default."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["WideResNet"]


class _Block(nn.Module):
    """Batch norm, ReLU and 3×3 convolution, twice; a 1×1 convolution where the shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        changes = stride != 1 or in_channels != channels
        self.shortcut = nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(x))
        # The activated input goes to both where the shape changes, as in the authors' definition.
        shortcut = x if self.shortcut is None else self.shortcut(y)
        y = self.conv2(F.relu(self.bn2(self.conv1(y))))
        return y + shortcut


class WideResNet(nn.Module):
    """Three stages of pre-activated blocks of ``widths`` channels; the later two halve the resolution.

    Args:
        num_classes: outputs of the classifier.
        depth: 6 n + 4, with n blocks in each stage.
        widen: factor on 16, 32 and 64 channels.
        stem_stride: 2 for inputs of 64 pixels, which then have the size that the network was made for.
        widths: channels of the stages, in place of ``widen``.

    Shape:
        - Input: (N, 3, H, W)
        - Output: (N, num_classes)

    Raises:
        ValueError: for a depth that is not 6 n + 4.

    Examples:
        >>> import torch
        >>> from bap.models import WideResNet
        >>> WideResNet(10, depth=10, widen=1)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        num_classes: int = 1000,
        depth: int = 28,
        widen: int = 4,
        stem_stride: int = 2,
        widths: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"WideResNet(): expected `depth` to be 6 n + 4, at least 10, got {depth}.")
        blocks = (depth - 4) // 6
        sizes = tuple(widths) if widths is not None else (16 * widen, 32 * widen, 64 * widen)
        self.conv1 = nn.Conv2d(3, 16, 3, stride=stem_stride, padding=1, bias=False)
        self.layer1 = self._stage(16, sizes[0], blocks, 1)
        self.layer2 = self._stage(sizes[0], sizes[1], blocks, 2)
        self.layer3 = self._stage(sizes[1], sizes[2], blocks, 2)
        self.bn = nn.BatchNorm2d(sizes[2])
        self.fc = nn.Linear(sizes[2], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = _Block(in_channels, channels, stride)
        return nn.Sequential(first, *(_Block(channels, channels, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Maps images to logits."""
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.fc(F.adaptive_avg_pool2d(F.relu(self.bn(x)), 1).flatten(1))
