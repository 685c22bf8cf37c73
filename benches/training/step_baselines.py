"""Whole steps of ResNet-26 with each variant's convolutions: one domain, the same weights and switches."""

import copy
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benches import ours
from benches.networks import CROPS, NETWORKS, in_lists
from benches.photographs import batches

DOMAIN = "photographs"
SIZE = NETWORKS["resnet26"][1]
STEM = "conv1"
THRESHOLD = 5e-3
ON, OFF = 1.0, -1.0


class MaskedSwitchConv2d(nn.Module):
    """A convolution of x times binary switches, trained by the straight-through estimator: plain autograd."""

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
    """A convolution of the listed channels, copied out of input and weight in every call; it trains no switches."""

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


REPLACED: dict[str, Callable[[nn.Conv2d, Tensor], nn.Module]] = {
    "masked": MaskedSwitchConv2d,
    "naive": NaiveSwitchConv2d,
}


@lru_cache(maxsize=1)
def plain() -> nn.Module:
    """Return the plain network with random weights, in training mode, nchw."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = NETWORKS["resnet26"][0]().train()
        # Statistics of the photographs, from which batch norms go on.
        model(batches(SIZE, CROPS, count=1)[0])
    return model


def scores(model: nn.Module, density: float, seed: int) -> dict[str, Tensor]:
    """Draw scores for every convolution that gets switches; exactly density x channels of each are on."""
    found = {}
    for name, index in in_lists(model, density, seed).items():
        conv: Any = model.get_submodule(name)
        found[name] = torch.full((conv.in_channels,), OFF)
        found[name][index.long()] = ON
    return found


def switched(model: nn.Module, given: dict[str, Tensor]) -> nn.Module:
    """Convert a copy of a plain network through the package, with these scores."""
    bk = ours.package()
    made = bk.nn.switch_(copy.deepcopy(model), [DOMAIN], lambda module, name: name != STEM, threshold=THRESHOLD)
    bk.set_domain(made, DOMAIN)
    with torch.no_grad():
        for name, score in given.items():
            made.get_submodule(name).domains[DOMAIN].score.copy_(score)
    return made


def replaced(model: nn.Module, given: dict[str, Tensor], name: str) -> nn.Module:
    """Convert a copy of a plain network to a variant's own convolutions with these scores."""
    made = copy.deepcopy(model)
    for where, score in given.items():
        parent, _, child = where.rpartition(".")
        owner = made.get_submodule(parent)
        setattr(owner, child, REPLACED[name](getattr(owner, child), score))
    return made


def network(name: str, given: dict[str, Tensor]) -> Any:
    """One variant's network: ``dense``, of `REPLACED`, or the package's own under any of its backends."""
    if name == "dense":
        return copy.deepcopy(plain())
    return replaced(plain(), given, name) if name in REPLACED else switched(plain(), given)


def freeze(model: nn.Module) -> None:
    """Take all convolution weights out of training."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, MaskedSwitchConv2d, NaiveSwitchConv2d)):
            module.weight.requires_grad_(False)


def trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters that are trained, under names that all variants share."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name.replace(f"domains.{DOMAIN}.", ""), parameter
