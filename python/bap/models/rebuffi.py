"""The ResNet-26 of Rebuffi, Bilen and Vedaldi's public code, and the names in their released weights and in URL's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from bap.models.resnet26 import ResNet26

__all__ = ["RebuffiResNet26", "URLResNet26", "renamed_keys"]


class RebuffiResNet26(ResNet26):
    """ResNet-26 as its authors publish it [P]: no ReLU after the stem, batch norm and ReLU before the pooling.

    Convolutions and blocks are those of :class:`ResNet26`. Its batch norms have 7,744 affine parameters, 512 more than
    those of :class:`ResNet26`.

    Args:
        num_classes: outputs of the classifier.
        widths: channels of the stages; the stem has half of the first.
        blocks: basic blocks of each stage.

    Shape:
        - Input: (N, 3, H, W), H and W multiples of 8; 64 or 72 for the decathlon
        - Output: (N, num_classes)

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from bap.models import RebuffiResNet26
        >>> model = RebuffiResNet26(10)
        >>> sum(p.numel() for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters())
        7744
    """

    def __init__(
        self, num_classes: int = 1000, widths: Sequence[int] = (64, 128, 256), blocks: Sequence[int] = (4, 4, 4)
    ) -> None:
        super().__init__(num_classes, widths, blocks)
        self.end_bn = nn.BatchNorm2d(widths[2])

    def forward(self, x: Tensor) -> Tensor:
        """Maps images to logits."""
        x = self.bn1(self.conv1(x))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = F.relu(self.end_bn(x))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class URLResNet26(RebuffiResNet26):
    """The same without a ReLU after the last batch norm, as in URL's public code [P] (Li, Liu and Bilen, IJCV 2023).

    Args:
        num_classes, widths, blocks: as in :class:`RebuffiResNet26`.

    Shape:
        - Input: (N, 3, H, W), H and W multiples of 8; 64 or 72 for the decathlon
        - Output: (N, num_classes)

    Examples:
        >>> import torch
        >>> from bap.models import URLResNet26
        >>> URLResNet26(10, widths=(8, 16, 32), blocks=(1, 1, 1))(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Maps images to logits."""
        x = self.bn1(self.conv1(x))
        x = self.end_bn(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


# Names in the authors' files, each a pattern and ours. Their second convolution follows a ReLU in a Sequential, and
# each batch norm and classifier is the first of a list, of which a file of one task has no more.
_PATTERNS = (
    (r"pre_layers_conv\.conv\.(.+)", r"conv1.\1"),
    (r"pre_layers_conv\.bns\.0\.(.+)", r"bn1.\1"),
    (r"(layer\d\.\d+)\.conv1\.conv\.(.+)", r"\1.conv1.\2"),
    (r"(layer\d\.\d+)\.conv1\.bns\.0\.(.+)", r"\1.bn1.\2"),
    (r"(layer\d\.\d+)\.conv2\.1\.conv\.(.+)", r"\1.conv2.\2"),
    (r"(layer\d\.\d+)\.conv2\.1\.bns\.0\.(.+)", r"\1.bn2.\2"),
    (r"end_bns\.0\.0\.(.+)", r"end_bn.\1"),
    (r"linears\.0\.(.+)", r"fc.\1"),
    # URL's: one task, or the first of several.
    (r"cls_fn\.(weight|bias)", r"fc.\1"),
    (r"cls_fn\.0\.(.+)", r"fc.\1"),
)


def renamed_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Entries of released weights under the names of :class:`RebuffiResNet26`; other names stay.

    Understood are the names of ``srebuffi/residual_adapters`` without adapters, and of ``VICO-UoE/
    UniversalRepresentations``, whose network is :class:`URLResNet26`. Classifiers of further tasks in a file of URL's
    are left out, as one network is loaded.

    Examples:
        >>> import torch
        >>> from bap.models import renamed_keys
        >>> list(renamed_keys({"layer1.0.conv2.1.bns.0.weight": torch.ones(2), "end_bns.0.0.bias": torch.ones(2)}))
        ['layer1.0.bn2.weight', 'end_bn.bias']
    """
    renamed = {}
    for key, value in state.items():
        if re.fullmatch(r"cls_fn\.[1-9]\d*\..+", key):
            continue
        for pattern, name in _PATTERNS:
            match = re.fullmatch(pattern, key)
            if match is not None:
                key = match.expand(name)
                break
        renamed[key] = value
    return renamed
