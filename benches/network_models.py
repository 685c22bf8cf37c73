"""Whole networks of the benches: what they are, the settings they run in, and their in-lists and masks."""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benches import ours
from benches.cases import draw_list
from benches.summary import WHOLE_NETWORK

DOMAIN = "photographs"
FEW_CHANNELS = 4
# Of the networks without a fixed number.
CLASSES = 100


def _torchvision(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from torchvision import models

        return models.get_model(name, weights=None)

    return make


def _bap(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from bap import models

        model: nn.Module = getattr(models, name)(num_classes=CLASSES)
        return model

    return make


# Constructor and image size.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet50": (_torchvision("resnet50"), 224),
    "resnet26": (_bap("ResNet26"), 64),
    "densenet121": (_torchvision("densenet121"), 224),
    "wrn28_4": (_bap("WideResNet"), 64),
    "resnet18": (_torchvision("resnet18"), 224),
    "mobilenet_v2": (_torchvision("mobilenet_v2"), 224),
    "mobilenet_v3_large": (_torchvision("mobilenet_v3_large"), 224),
    "efficientnet_b0": (_torchvision("efficientnet_b0"), 224),
    "vgg11_bn": (_torchvision("vgg11_bn"), 224),
    "vgg16_bn": (_torchvision("vgg16_bn"), 224),
}
# Of the default study.
DEFAULT_NETWORKS = ("resnet50", "resnet26")


@dataclass(frozen=True)
class NetworkCell:
    """A network with batch, density and memory format."""

    network: str
    batch: int
    density: float
    layout: str
    lists: str = "in"

    @property
    def id(self) -> str:
        """Name in ids and tables, such as ``resnet50-b1-network-d50-in-channels_last``."""
        return f"{self.network}-b{self.batch}-{WHOLE_NETWORK}-d{self.density * 100:.0f}-{self.lists}-{self.layout}"

    @property
    def seed(self) -> int:
        """Seed of the lists, the same for all batches and layouts."""
        return zlib.crc32(f"{self.network}-{WHOLE_NETWORK}-d{self.density * 100:.0f}".encode())


def network_cells(
    batches: Sequence[int],
    densities: Sequence[float],
    layouts: Sequence[str],
    networks: Sequence[str] = DEFAULT_NETWORKS,
    lists: Sequence[str] = ("in",),
) -> list[NetworkCell]:
    """Return the networks in every setting, in complete passes over the networks, density 0.5 first."""
    order = sorted(densities, key=lambda density: (abs(density - 0.5), density))
    return [
        NetworkCell(network, batch, density, layout, kind)
        for layout in layouts
        for kind in lists
        for density in order
        for batch in batches
        for network in networks
    ]


class MaskedInputConv2d(nn.Module):
    """A dense convolution of the input times a mask."""

    def __init__(self, conv: nn.Conv2d, in_index: Tensor) -> None:
        super().__init__()
        self.conv = conv
        mask = torch.zeros(1, conv.in_channels, 1, 1)
        mask[:, in_index.long()] = 1
        self.register_buffer("mask", mask.to(conv.weight))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply and convolve."""
        return self.conv(x * self.get_buffer("mask"))


def in_lists(model: nn.Module, density: float, seed: int, ragged: bool = False) -> dict[str, Tensor]:
    """Draw an in-list for every convolution with more than `FEW_CHANNELS` input channels; grouped ones read all."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: draw_list(module.in_channels, density, ragged, generator)
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and module.groups == 1 and module.in_channels > FEW_CHANNELS
    }


def mask_(model: nn.Module, lists: dict[str, Tensor]) -> nn.Module:
    """Replace the listed convolutions by masked ones, in place."""
    for name, in_index in lists.items():
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        conv = getattr(owner, child)
        setattr(owner, child, MaskedInputConv2d(conv, in_index))
    return model


def swap_(model: nn.Module, lists: dict[str, Tensor]) -> nn.Module:
    """Replace the convolutions by the package's layers with the lists."""
    bk = ours.package()
    bk.swap_(model)
    layers = [name for name, module in model.named_modules() if isinstance(module, bk.nn.GatheredConv2d)]
    table = bk.ChannelTable({DOMAIN: {name: bk.ChannelLists(lists.get(name)) for name in layers}})
    bk.attach_(model, table)
    bk.set_domain(model, DOMAIN)
    return model


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def conv_flop(model: nn.Module, example: Tensor, lists: dict[str, Tensor]) -> tuple[float, float]:
    """FLOP (2 per multiply-add) of all convolutions: (dense, with the lists)."""
    full, kept_flop = 0.0, 0.0

    def count(name: str) -> Callable[..., None]:
        def hook(module: nn.Conv2d, inputs: tuple[Tensor], output: Tensor) -> None:
            nonlocal full, kept_flop
            per_channel = 2.0 * output.numel() * module.weight[0, 0].numel()
            own = module.weight.shape[1]
            full += per_channel * own
            kept_flop += per_channel * (len(lists[name]) if name in lists else own)

        return hook

    hooks = [m.register_forward_hook(count(name)) for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    model(example)
    for hook in hooks:
        hook.remove()
    return full, kept_flop
