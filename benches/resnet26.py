"""ResNet-26 for 64x64 images: the backbone of the Visual Decathlon (Rebuffi, Bilen and Vedaldi, NIPS 2017)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut without parameters.

    Where the block halves the resolution and doubles the width, the shortcut is average-pooled and gets zero channels.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.extra_channels = channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C_in, H, W) to (N, C_out, H / stride, W / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        shortcut = F.avg_pool2d(x, 2) if self.stride == 2 else x
        if self.extra_channels:
            shortcut = F.pad(shortcut, (0, 0, 0, 0, 0, self.extra_channels))
        return F.relu(y + shortcut)


class ResNet26(nn.Module):
    """Three stages of four basic blocks, 64-128-256 channels, each stage opened with stride 2.

    Args:
        num_classes: Width of the classifier.

    Shape:
        - Input: (N, 3, 64, 64)
        - Output: (N, num_classes)
    """

    def __init__(self, num_classes: int = 100) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.layer1 = self._stage(32, 64)
        self.layer2 = self._stage(64, 128)
        self.layer3 = self._stage(128, 256)
        self.fc = nn.Linear(256, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _stage(in_channels: int, channels: int) -> nn.Sequential:
        blocks = [BasicBlock(in_channels, channels, stride=2)]
        blocks += [BasicBlock(channels, channels, stride=1) for _ in range(3)]
        return nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, 64, 64) to logits (N, num_classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
