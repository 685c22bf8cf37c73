"""Networks for tests of layers and plans: small ones, torchvision's at a reduced size, and random ones.

Weights, affine parameters and running statistics are random, some scales negative, so that nothing cancels.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from bap.models import ResNet26
from torch import Tensor, nn

import bap_kernels as bk


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw all weights and statistics; return the model in eval mode."""
    generator = torch.Generator().manual_seed(seed)

    def draw(like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=generator)

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, generator=generator)
        elif isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                module.weight.copy_((draw(module.weight) + 0.5) * torch.where(draw(module.weight) < 0.2, -1.0, 1.0))
                module.bias.copy_(draw(module.bias) - 0.5)
            module.running_mean.copy_(draw(module.bias) - 0.5)
            module.running_var.copy_(draw(module.bias) + 0.5)
    return model.eval()


def unit(c_in: int, c_out: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU in place."""
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU(inplace=True))


class Block(nn.Module):
    """A residual block of two convolutions."""

    def __init__(self, width: int, groups: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, groups=groups, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(torch.relu(self.bn1(self.conv1(x))))


class Residual(nn.Module):
    """Basic blocks with an identity or a projected shortcut, as in ResNets for CIFAR."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = unit(3, 12)
        self.a1, self.a2, self.na = unit(12, 10), nn.Conv2d(10, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.b1, self.b2, self.nb = unit(12, 14, stride=2), nn.Conv2d(14, 20, 1), nn.BatchNorm2d(20)
        self.project = nn.Sequential(nn.Conv2d(12, 20, 1, stride=2), nn.BatchNorm2d(20))
        self.c = nn.Conv2d(20, 9, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(x + self.na(self.a2(self.a1(x))))
        y = self.nb(self.b2(self.b1(x)))
        y += self.project(x)
        return self.c(F.relu_(y))


class PreActivation(nn.Module):
    """Wide-ResNet blocks: batch norm and ReLU before each convolution, shortcuts around them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.n1, self.c1 = nn.BatchNorm2d(8), nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)
        self.n2, self.c2 = nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3, padding=1)
        self.short = nn.Conv2d(8, 16, 1, stride=2)
        self.n3, self.c3 = nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3, padding=1)
        self.n4, self.head = nn.BatchNorm2d(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.n1(x).relu()
        x = self.c2(self.n2(self.c1(y)).relu()) + self.short(y)
        x = x + self.c3(torch.relu(self.n3(x)))
        return self.head(F.relu(self.n4(x)).mean((2, 3)))


class Dense(nn.Module):
    """Concatenations that grow, and a transition, as in DenseNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(6 + 4 * i) for i in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(6 + 4 * i, 4, 3, padding=1) for i in range(3))
        self.last = nn.Sequential(nn.BatchNorm2d(18), nn.ReLU(), nn.Conv2d(18, 8, 1), nn.AvgPool2d(2))
        self.head = nn.Conv2d(8, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.stem(x)]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            parts.append(conv(F.relu(norm(torch.cat(parts, 1)))))
        return self.head(self.last(torch.cat(parts, dim=1)))


class Inception(nn.Module):
    """Concatenated branches with several consumers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = unit(3, 10)
        self.a, self.b, self.c = unit(10, 6, 1), nn.Sequential(unit(10, 4, 1), unit(4, 8)), unit(10, 5, 1)
        self.d, self.e = unit(19, 7, 1), unit(19, 7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([self.a(x), self.b(x), self.c(F.max_pool2d(x, 3, 1, 1))], 1)
        return self.d(x) * torch.sigmoid(self.e(x))


class Inverted(nn.Module):
    """MobileNet's inverted residuals, with squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU6(inplace=True))
        self.up = nn.Sequential(nn.Conv2d(8, 24, 1), nn.BatchNorm2d(24), nn.ReLU6(inplace=True))
        self.deep = nn.Sequential(nn.Conv2d(24, 24, 3, padding=1, groups=24), nn.BatchNorm2d(24), nn.ReLU6())
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(24, 6, 1), nn.SiLU(), nn.Conv2d(6, 24, 1))
        self.down = nn.Sequential(nn.Conv2d(24, 8, 1), nn.BatchNorm2d(8), nn.Dropout(0.5))
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.deep(self.up(x))
        y = y * torch.sigmoid(self.squeeze(y))
        return self.head(x + self.down(y))


class OptionA(nn.Module):
    """A shortcut that subsamples pixels and pads channels on both sides, and a flattened head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = unit(3, 8)
        self.a, self.b, self.n = unit(8, 16, stride=2), nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.last = unit(16, 4)
        self.head = nn.Linear(4 * 64, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4), "constant", 0)
        x = F.relu(self.n(self.b(self.a(x))) + short)
        return self.head(torch.flatten(self.last(x), 1))


class Shared(nn.Module):
    """A layer that is called twice, a sum of a tensor with itself, in-place writes, and operations without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice, self.tail = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), unit(8, 6)
        self.odd = nn.Sequential(nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3, padding=1, groups=2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.twice(x)
        x.relu_()
        x = self.twice(x) + y
        x = x + x
        z = torch.softmax(x, 1).roll(1, 1)
        return self.tail(self.odd(x) * z + 0.5)


class DataDependent(nn.Module):
    """A submodule that torch.fx cannot trace."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) if x.sum() > -1e9 else x

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.tail = unit(3, 8), self.Inner(), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.inner(self.stem(x)))


def _torchvision(name: str, **options: object) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import torchvision

        return getattr(torchvision.models, name)(weights=None, **options)

    return build


SMALL: dict[str, Callable[[], nn.Module]] = {
    "residual": Residual,
    "preactivation": PreActivation,
    "dense": Dense,
    "inception": Inception,
    "inverted": Inverted,
    "option_a": OptionA,
    "shared": Shared,
    "data_dependent": DataDependent,
}
LARGE: dict[str, Callable[[], nn.Module]] = {
    "resnet26": ResNet26,
    "resnet18": _torchvision("resnet18"),
    "resnet50": _torchvision("resnet50"),
    "densenet121": _torchvision("densenet121"),
    "vgg11_bn": _torchvision("vgg11_bn"),
    "mobilenet_v2": _torchvision("mobilenet_v2"),
}


def _random_layer(kind: str, c_in: int, c_out: int, kernel: int, rng: random.Random) -> nn.Module:
    if kind == "conv":
        return nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=rng.random() < 0.5)
    if kind == "depthwise":
        return nn.Conv2d(c_in, c_in, 3, padding=1, groups=c_in)
    if kind == "pool":
        return rng.choice((nn.AvgPool2d, nn.MaxPool2d))(3, 1, 1)
    return nn.BatchNorm2d(c_in) if kind == "norm" else nn.ReLU(inplace=rng.random() < 0.3)


class _Random(nn.Module):
    """Random layers; each entry of ``steps`` is an operation on earlier tensors."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        rng = random.Random(seed)
        self.layers = nn.ModuleList([nn.Conv2d(3, 8, 3, padding=1)])
        widths = [8]
        self.steps: list[tuple[str, int, int]] = [("layer", -1, 0)]
        for _ in range(rng.randint(4, 14)):
            kind = rng.choice(("conv", "conv", "conv", "norm", "relu", "add", "cat", "mul", "depthwise", "pool"))
            a = rng.randrange(max(0, len(widths) - 4), len(widths))
            same = [i for i, width in enumerate(widths) if width == widths[a]]
            if kind in ("add", "mul"):
                self.steps.append((kind, a, rng.choice(same)))
                widths.append(widths[a])
            elif kind == "cat":
                b = rng.randrange(len(widths))
                self.steps.append((kind, a, b))
                widths.append(widths[a] + widths[b])
            else:
                width = rng.choice((4, 6, 8, widths[a])) if kind == "conv" else widths[a]
                kernel = rng.choice((1, 3))
                self.steps.append(("layer", a, len(self.layers)))
                self.layers.append(_random_layer(kind, widths[a], width, kernel, rng))
                widths.append(width)
        self.tail = nn.Conv2d(widths[-1], 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        tensors: list[Tensor] = []
        for kind, a, b in self.steps:
            if kind == "layer":
                tensors.append(self.layers[b](x if a < 0 else tensors[a]))
            elif kind == "cat":
                tensors.append(torch.cat([tensors[a], tensors[b]], 1))
            else:
                tensors.append(tensors[a] + tensors[b] if kind == "add" else tensors[a] * tensors[b])
        return self.tail(tensors[-1])


def random_network(seed: int) -> nn.Module:
    """Return a network of random layers, sums, products and concatenations."""
    torch.manual_seed(seed)
    return _Random(seed)


def masked_dense(model: nn.Module, table: bk.ChannelTable, domain: str) -> nn.Module:
    """Add hooks that multiply by masks to an unswapped model: the reference for lists, without code of the package.

    Outputs of unlisted filters are zero, as in `MaskedConv2d`.
    """

    def mask(listed: Tensor | None, width: int) -> Tensor:
        if listed is None:
            return torch.ones(1, width, 1, 1)
        return torch.zeros(1, width, 1, 1).index_fill_(1, listed.long(), 1)

    for name, lists in table[domain].items():
        conv = model.get_submodule(name)
        reads, writes = mask(lists.in_index, conv.in_channels), mask(lists.out_index, conv.out_channels)

        def masked(_: nn.Module, args: tuple, kwargs: dict, reads: Tensor = reads) -> tuple[tuple, dict]:
            x = args[0] if args else kwargs["input"]
            return (x * reads.to(x.dtype),), {}

        conv.register_forward_pre_hook(masked, with_kwargs=True)
        conv.register_forward_hook(lambda _, __, y, writes=writes: y * writes.to(y.dtype))
    return model
