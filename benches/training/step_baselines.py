"""ResNet-26 with the convolutions of each variant: one domain, the same weights and switches."""

import copy
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benches import ours
from benches.network_models import NETWORKS, in_lists
from benches.photographs import CROPS, batches

DOMAIN = "photographs"
SIZE = NETWORKS["resnet26"][1]
STEM = "conv1"
THRESHOLD = 5e-3
ON, OFF = 1.0, -1.0


class MaskedSwitchConv2d(nn.Module):
    """A convolution of x times binary switches with the straight-through estimator, by plain autograd."""

    def __init__(self, conv: nn.Conv2d, score: Tensor) -> None:
        super().__init__()
        self.weight = conv.weight
        self.score = nn.Parameter(score.clone())
        self.stride, self.padding = conv.stride, conv.padding

    def forward(self, x: Tensor) -> Tensor:
        """Multiply and convolve."""
        binary = (self.score > THRESHOLD).to(x.dtype)
        switch = binary + self.score - self.score.detach()
        return F.conv2d(x * switch.view(1, -1, 1, 1), self.weight, None, self.stride, self.padding)


class NaiveSwitchConv2d(nn.Module):
    """A convolution of channels copied from input and weight in every call; it trains no switches."""

    on: Tensor

    def __init__(self, conv: nn.Conv2d, score: Tensor) -> None:
        super().__init__()
        self.weight = conv.weight
        self.stride, self.padding = conv.stride, conv.padding
        self.register_buffer("on", (score > THRESHOLD).nonzero().flatten().int(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Copy and convolve."""
        weight = self.weight.index_select(1, self.on)
        return F.conv2d(x.index_select(1, self.on), weight, None, self.stride, self.padding)


LAYERS: dict[str, Callable[[nn.Conv2d, Tensor], nn.Module]] = {
    "masked": MaskedSwitchConv2d,
    "naive": NaiveSwitchConv2d,
}


@lru_cache(maxsize=1)
def plain() -> nn.Module:
    """Return the plain network with random weights, in training mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = NETWORKS["resnet26"][0]().train()
        # Gives batch norms the statistics of the photographs.
        model(batches(SIZE, CROPS, count=1)[0])
    return model


def scores(model: nn.Module, density: float, seed: int) -> dict[str, Tensor]:
    """Draw scores for every convolution with switches; exactly density x channels of each are on."""
    result = {}
    for name, index in in_lists(model, density, seed).items():
        conv: Any = model.get_submodule(name)
        result[name] = torch.full((conv.in_channels,), OFF)
        result[name][index.long()] = ON
    return result


def switched(model: nn.Module, scores: dict[str, Tensor]) -> nn.Module:
    """Return a copy of a plain network converted by the package, with these scores."""
    bk = ours.package()
    converted: Any = bk.nn.switch_(
        copy.deepcopy(model), [DOMAIN], lambda module, name: name != STEM, threshold=THRESHOLD
    )
    bk.set_domain(converted, DOMAIN)
    with torch.no_grad():
        for name, score in scores.items():
            converted.get_submodule(name).domains[DOMAIN].score.copy_(score)
    return converted


def replaced(model: nn.Module, scores: dict[str, Tensor], name: str) -> nn.Module:
    """Return a copy of a plain network with the convolutions of a variant and these scores."""
    model = copy.deepcopy(model)
    for path, score in scores.items():
        parent, _, child = path.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, child, LAYERS[name](getattr(owner, child), score))
    return model


def network(name: str, scores: dict[str, Tensor]) -> Any:
    """Return the network of a variant: ``dense``, of `LAYERS`, or converted by the package."""
    if name == "dense":
        return copy.deepcopy(plain())
    return replaced(plain(), scores, name) if name in LAYERS else switched(plain(), scores)


def freeze(model: nn.Module) -> None:
    """Freeze all convolution weights."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, MaskedSwitchConv2d, NaiveSwitchConv2d)):
            module.weight.requires_grad_(False)


def trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the trained parameters under names that all variants share."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name.replace(f"domains.{DOMAIN}.", ""), parameter
