"""A ResNet-26 after that of the Visual Decathlon (Rebuffi, Bilen and Vedaldi, NIPS 2017), of 64, 128 and 256 channels.

Their own definition differs in two places, see :class:`bap.models.RebuffiResNet26`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ResNet26"]


class _Block(nn.Module):
    """Two 3×3 convolutions beside a shortcut without parameters: average-pooled and given zero channels if needed."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.more = channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        shortcut = F.avg_pool2d(x, self.stride) if self.stride > 1 else x
        if self.more:
            shortcut = F.pad(shortcut, (0, 0, 0, 0, 0, self.more))
        return F.relu(y + shortcut)


class ResNet26(nn.Module):
    """Three stages of basic blocks, each opened with stride 2; the shortcuts have no parameters.

    With the defaults there are 25 convolutions and the classifier. Narrower and shorter ones serve small images.

    Args:
        num_classes: outputs of the classifier.
        widths: channels of the stages; the stem has half of the first.
        blocks: basic blocks of each stage.

    Shape:
        - Input: (N, 3, H, W), H and W multiples of 8; the decathlon's are 64
        - Output: (N, num_classes)

    Examples:
        >>> import torch
        >>> from bap.models import ResNet26
        >>> ResNet26(10, widths=(8, 16, 32), blocks=(1, 1, 1))(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self, num_classes: int = 1000, widths: Sequence[int] = (64, 128, 256), blocks: Sequence[int] = (4, 4, 4)
    ) -> None:
        super().__init__()
        stem = widths[0] // 2
        self.conv1 = nn.Conv2d(3, stem, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.layer1 = self._stage(stem, widths[0], blocks[0])
        self.layer2 = self._stage(widths[0], widths[1], blocks[1])
        self.layer3 = self._stage(widths[1], widths[2], blocks[2])
        self.fc = nn.Linear(widths[2], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _stage(in_channels: int, channels: int, blocks: int) -> nn.Sequential:
        first = _Block(in_channels, channels, stride=2)
        return nn.Sequential(first, *(_Block(channels, channels, stride=1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Maps images to logits."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
