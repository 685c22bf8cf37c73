"""The networks of ``tools/networks.txt``: built without pretrained weights, with numbers in which errors show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["LIST", "build", "calibrate_", "names", "relative_error"]

LIST = Path(__file__).with_name("networks.txt")


def names(path: Path = LIST) -> dict[str, tuple[int, ...]]:
    """{name: shape of the input}, in the file's order."""
    rows = [line.split() for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
    return {name: tuple(int(side) for side in shape.split("x")) for name, shape in rows}


def _unit(c_in: int, c_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True))


class UNetTranspose(nn.Module):
    """A U-Net whose way up is made of transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([_unit(3, 16), _unit(16, 32), _unit(32, 64)])
        self.rise = nn.ModuleList([nn.ConvTranspose2d(64, 32, 2, stride=2), nn.ConvTranspose2d(32, 16, 2, stride=2)])
        self.up = nn.ModuleList([_unit(64, 32), _unit(32, 16)])
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, 3, H, W) to (N, 4, H, W)."""
        skips = []
        for number, block in enumerate(self.down):
            x = block(x)
            if number < 2:
                skips.append(x)
                x = F.max_pool2d(x, 2)
        for rise, block in zip(self.rise, self.up, strict=True):
            x = block(torch.cat([rise(x), skips.pop()], 1))
        return self.head(x)


class UNetInterp(nn.Module):
    """A U-Net that interpolates on its way up, to the size of the skipped tensor, which an attention gate scales."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([_unit(3, 16), _unit(16, 32), _unit(32, 64)])
        self.gates = nn.ModuleList([nn.Conv2d(96, 1, 1), nn.Conv2d(48, 1, 1)])
        self.up = nn.ModuleList([_unit(96, 32), _unit(48, 16)])
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, 3, H, W) to (N, 4, H, W)."""
        skips = []
        for number, block in enumerate(self.down):
            x = block(x)
            if number < 2:
                skips.append(x)
                x = F.max_pool2d(x, 2)
        for gate, block in zip(self.gates, self.up, strict=True):
            skip = skips.pop()
            x = F.interpolate(x, size=skip.shape[2:], mode="bilinear", align_corners=False)
            skip = skip * torch.sigmoid(gate(torch.cat([x, skip], 1)))
            x = block(torch.cat([x, skip], 1))
        return self.head(x)


class _OfOneLevel(nn.Module):
    """A detection head, which takes a list of tensors, on one."""

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
        return _OfOneLevel(RetinaNetHead(32, 3, 5))
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
    """A network by its name in the list, in eval mode, its numbers as its package draws them."""
    package, _, rest = name.partition("/")
    if package == "own":
        return {"unet_transpose": UNetTranspose, "unet_interp": UNetInterp}[rest]().eval()
    if package == "tv":
        return _torchvision(rest).eval()
    import timm

    model, _, kind = rest.partition("/")
    return timm.create_model(model, pretrained=False, features_only=kind == "features").eval()


def _norms(model: nn.Module) -> list[nn.Module]:
    return [one for one in model.modules() if isinstance(getattr(one, "running_mean", None), Tensor)]


@torch.no_grad()
def calibrate_(model: nn.Module, x: Tensor, seed: int = 0) -> nn.Module:
    """Gives norms random parameters and the statistics of their input, so that no channel vanishes or explodes.

    Scales that start as zeros or nearly so (the last norm of a block, layer scale) would hide errors behind them.
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn(like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=generator)

    for parameter in model.parameters():
        if parameter.numel() and parameter.abs().max() <= 1e-3:
            parameter.copy_(drawn(parameter) * 0.5)
    norms = _norms(model)
    for norm in norms:
        weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
        if weight is not None:
            weight.copy_((drawn(weight) + 0.5) * torch.where(drawn(weight) < 0.2, -1.0, 1.0))
        if bias is not None:
            bias.copy_(drawn(bias) - 0.5)
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.momentum, norm.training = 1.0, True
        else:
            norm.running_mean.copy_(drawn(norm.running_mean) - 0.5)  # type: ignore[operator, arg-type]
            norm.running_var.copy_(drawn(norm.running_var) + 0.5)  # type: ignore[operator, arg-type]
    model(x)
    for norm in norms:
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.momentum = 0.1
            # One or two pixels can have no variance at all.
            norm.running_var.add_(0.05)  # type: ignore[union-attr]
    return model.eval()


def relative_error(got: Any, expected: Any) -> float:
    """The largest error over all tensors of a result, as a share of each tensor's largest number."""
    if isinstance(expected, Tensor):
        if not isinstance(got, Tensor) or got.shape != expected.shape:
            return float("inf")
        if expected.numel() == 0:
            return 0.0
        error = (got.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-30)
        return error.item() if error.isfinite() else float("inf")
    if isinstance(expected, dict):
        same = isinstance(got, dict) and list(got) == list(expected)
        return relative_error(list(got.values()), list(expected.values())) if same else float("inf")
    if isinstance(expected, (list, tuple)):
        if not isinstance(got, (list, tuple)) or len(got) != len(expected):
            return float("inf")
        return max((relative_error(*pair) for pair in zip(got, expected, strict=True)), default=0.0)
    return 0.0 if got == expected else float("inf")
