"""One small network as every kind that depends on the domain, and what all of them have to keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bap_kernels as bk
from tests.networks import randomise

DOMAINS = ("birds", "cars")
X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Small(nn.Module):
    """Plain and depthwise convolutions, batch norms, a residual sum and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.depthwise, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn3 = nn.Conv2d(16, 24, 1), nn.BatchNorm2d(24)
        self.conv3 = nn.Conv2d(24, 24, 3, padding=1)
        self.fc = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.depthwise(x)))
        x = F.relu(self.bn3(self.conv2(x)))
        x = x + self.conv3(x)
        return self.fc(x.mean((2, 3)))


def dense() -> nn.Module:
    torch.manual_seed(0)
    return randomise(Small())


def swapped() -> nn.Module:
    model = bk.swap_(dense())
    return bk.attach_(model, bk.ChannelTable.random(model, DOMAINS, 0.5))


def masked() -> nn.Module:
    model = bk.swap_(dense(), layer_type=bk.nn.MaskedConv2d)
    return bk.attach_(model, bk.ChannelTable.random(model, DOMAINS, 0.5, both=True))


def planned() -> bk.PlannedNetwork:
    return bk.plan(swapped(), X, DOMAINS[0])


def switched() -> nn.Module:
    model = bk.nn.switch_(dense(), DOMAINS, heads=True)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in model.modules():
            for name in DOMAINS:
                if isinstance(layer, bk.nn.SwitchedConv2d):
                    layer.domains[name].score.uniform_(0, 0.01, generator=generator)  # type: ignore[union-attr,operator]
                elif isinstance(layer, bk.nn.DomainBatchNorm2d):
                    layer.domains[name].bias.uniform_(-0.3, 0.3, generator=generator)  # type: ignore[union-attr,operator]
    return model


KINDS: dict[str, Callable[[], nn.Module]] = {
    "swapped": swapped,
    "masked": masked,
    "planned": planned,
    "switched": switched,
}
# Those that train.
LAYERED = [kind for kind in KINDS if kind != "planned"]


def network_of(model: nn.Module) -> nn.Module:
    """The network with its layers: what a plan was made of, or the model itself."""
    return model.model if isinstance(model, bk.PlannedNetwork) else model


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor = X, pick: Callable[[Any], Tensor] = lambda y: y) -> dict[str, Tensor]:
    """The result in every domain; the first one is set twice."""
    results = {}
    for name in (*DOMAINS, DOMAINS[0]):
        bk.set_domain(model, name)
        results[name] = pick(model(x)).float()
    return results


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    """Results of every domain are equal up to rounding, and those of two domains are not."""
    largest = max(float(value.abs().max()) for value in expected.values())
    assert float((expected[DOMAINS[0]] - expected[DOMAINS[1]]).abs().max()) > 5 * tolerance * largest
    for name in DOMAINS:
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=tolerance * largest, msg=lambda m: m)
