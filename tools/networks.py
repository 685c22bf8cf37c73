"""The networks of ``tools/networks.txt``: random weights, with values in which errors show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["LIST", "build", "calibrate_", "names", "relative_error", "zero_channels_"]

LIST = Path(__file__).with_name("networks.txt")


def names(path: Path = LIST) -> dict[str, tuple[int, ...]]:
    """Return {name: shape of the input}, in the order of the file."""
    rows = [line.split() for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
    return {name: tuple(int(side) for side in shape.split("x")) for name, shape in rows}


def _unit(c_in: int, c_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True))


class _UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([_unit(3, 16), _unit(16, 32), _unit(32, 64)])
        self.head = nn.Conv2d(16, 4, 1)

    def encode(self, x: Tensor) -> list[Tensor]:
        """Return the tensors to skip, the deepest last."""
        levels: list[Tensor] = []
        for block in self.down:
            levels.append(block(F.max_pool2d(levels[-1], 2) if levels else x))
        return levels


class UNetTranspose(_UNet):
    """A U-Net whose decoder has transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.rise = nn.ModuleList([nn.ConvTranspose2d(64, 32, 2, stride=2), nn.ConvTranspose2d(32, 16, 2, stride=2)])
        self.up = nn.ModuleList([_unit(64, 32), _unit(32, 16)])

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, 3, H, W) to (N, 4, H, W)."""
        *skips, x = self.encode(x)
        for rise, block in zip(self.rise, self.up, strict=True):
            x = block(torch.cat([rise(x), skips.pop()], 1))
        return self.head(x)


class UNetInterp(_UNet):
    """A U-Net whose decoder interpolates to the size of the skipped tensor, which an attention gate scales."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.ModuleList([nn.Conv2d(96, 1, 1), nn.Conv2d(48, 1, 1)])
        self.up = nn.ModuleList([_unit(96, 32), _unit(48, 16)])

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, 3, H, W) to (N, 4, H, W)."""
        *skips, x = self.encode(x)
        for gate, block in zip(self.gates, self.up, strict=True):
            skip = skips.pop()
            x = F.interpolate(x, size=skip.shape[2:], mode="bilinear", align_corners=False)
            skip = skip * torch.sigmoid(gate(torch.cat([x, skip], 1)))
            x = block(torch.cat([x, skip], 1))
        return self.head(x)


class _SingleLevel(nn.Module):
    """A detection head on one tensor instead of a list."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor) -> Any:
        return self.head([x])


def _torchvision(name: str) -> nn.Module:
    import torchvision
    from torchvision.models.detection import backbone_utils
    from torchvision.models.detection.retinanet import RetinaNetHead

    if name == "retinanet_head":
        return _SingleLevel(RetinaNetHead(32, 3, 5))
    if name.startswith("resnet18_fpn"):
        frozen = name.endswith("_frozenbn")
        norm = torchvision.ops.misc.FrozenBatchNorm2d if frozen else nn.BatchNorm2d
        return backbone_utils.resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=norm)
    if name == "mobilenet_v3_fpn":
        return backbone_utils.mobilenet_backbone(
            backbone_name="mobilenet_v3_large", weights=None, fpn=True, norm_layer=nn.BatchNorm2d
        )
    options: dict[str, Any] = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    if name.startswith(("fcn_", "deeplabv3_", "lraspp_")):
        options = {"weights_backbone": None}
    return torchvision.models.get_model(name, weights=None, **options)


def build(name: str) -> nn.Module:
    """Build a network by its name in the list, in eval mode, with the initial weights of its package."""
    package, _, rest = name.partition("/")
    if package == "own":
        return {"unet_transpose": UNetTranspose, "unet_interp": UNetInterp}[rest]().eval()
    if package == "tv":
        return _torchvision(rest).eval()
    import timm

    model, _, kind = rest.partition("/")
    return timm.create_model(model, pretrained=False, features_only=kind == "features").eval()


def _norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(getattr(module, "running_mean", None), Tensor)]


@torch.no_grad()
def calibrate_(model: nn.Module, x: Tensor, seed: int = 0) -> nn.Module:
    """Give norms random parameters and the statistics of their input, so that no channel vanishes or explodes.

    Scales that are initialised near zero (the last norm of a block, layer scale) would hide errors.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=generator)

    for parameter in model.parameters():
        if parameter.numel() and parameter.abs().max() <= 1e-3:
            parameter.copy_(uniform(parameter) * 0.5)
    norms = _norms(model)
    for norm in norms:
        weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
        if weight is not None:
            weight.copy_((uniform(weight) + 0.5) * torch.where(uniform(weight) < 0.2, -1.0, 1.0))
        if bias is not None:
            bias.copy_(uniform(bias) - 0.5)
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.momentum, norm.training = 1.0, True
        else:
            norm.running_mean.copy_(uniform(norm.running_mean) - 0.5)  # type: ignore[operator, arg-type]
            norm.running_var.copy_(uniform(norm.running_var) + 0.5)  # type: ignore[operator, arg-type]
    model(x)
    for norm in norms:
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.momentum = 0.1
            # One or two pixels can have no variance.
            norm.running_var.add_(0.05)  # type: ignore[union-attr]
    return model.eval()


@torch.no_grad()
def zero_channels_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Set a quarter of all input slices, filters and norms' channels to zero, as tools that prune by zeros do.

    Of these filters and channels half keep their bias or shift: constants that are not zero, or are after a ReLU.
    """
    generator = torch.Generator().manual_seed(seed)

    def chosen(count: int, share: float = 0.25) -> Tensor:
        return torch.rand(count, generator=generator) < share

    for module in model.modules():
        is_norm = isinstance(getattr(module, "running_mean", None), Tensor)
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if not isinstance(weight, Tensor) or not (is_norm or isinstance(module, nn.Conv2d)):
            continue
        off = chosen(len(weight))
        weight[off] = 0
        if bias is not None:
            bias[off & chosen(len(weight), 0.5)] = 0
        if isinstance(module, nn.Conv2d) and module.groups == 1 and module.in_channels > 3:
            weight[:, chosen(module.in_channels)] = 0
    return model


def relative_error(result: Any, expected: Any) -> float:
    """Largest error over all tensors of a result, relative to the largest value of each tensor."""
    if isinstance(expected, Tensor):
        if not isinstance(result, Tensor) or result.shape != expected.shape:
            return float("inf")
        if expected.numel() == 0:
            return 0.0
        error = (result.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-30)
        return error.item() if error.isfinite() else float("inf")
    if isinstance(expected, dict):
        same = isinstance(result, dict) and list(result) == list(expected)
        return relative_error(list(result.values()), list(expected.values())) if same else float("inf")
    if isinstance(expected, (list, tuple)):
        if not isinstance(result, (list, tuple)) or len(result) != len(expected):
            return float("inf")
        return max((relative_error(*pair) for pair in zip(result, expected, strict=True)), default=0.0)
    return 0.0 if result == expected else float("inf")
