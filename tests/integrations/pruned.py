"""A network for zeros and masks of pruning tools, and the masked dense network that it has to equal.

The reference has masks multiplied into its weights, in float64 and PyTorch's own operations.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bap_kernels as bk
from bap_kernels import ChannelTable
from tests.networks import Block, unit

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A residual block, a concatenation, depthwise and grouped layers, and one layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.side = unit(3, 12), unit(3, 4)
        self.block = Block(12)
        self.depthwise, self.norm = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 16, 1, groups=4)
        self.shared = nn.Conv2d(16, 16, 1)
        self.again = self.shared
        self.last = nn.Conv2d(16, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.block(self.stem(x)), self.side(x)], 1)
        x = self.grouped(F.relu(self.norm(self.depthwise(x))))
        return self.last(F.max_pool2d(self.again(F.relu(self.shared(x))), 2))


def masked_dense(model: nn.Module, masks: Mapping[str, Any]) -> nn.Module:
    """A float64 copy with each mask multiplied into its weight."""
    dense = copy.deepcopy(model).double()
    with torch.no_grad():
        for name, mask in masks.items():
            weight = dense.get_submodule(name).weight
            factor = torch.as_tensor(mask).double()
            weight *= factor.view(1, -1, 1, 1) if factor.dim() == 1 else factor  # type: ignore[operator]
    return dense


def error(run: nn.Module, x: Tensor, expected: Tensor) -> float:
    """The largest difference as a share of the largest number."""
    return float((run(x).double() - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def assert_equals(model: nn.Module, table: ChannelTable, dense: nn.Module, domain: str = "default") -> None:
    """Layers and a plan with these lists give what the dense network gives, in the model's dtype."""
    dtype = next(model.parameters()).dtype
    x = X.to(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    expected = dense.double()(x.double())
    swapped = bk.attach_(bk.swap_(copy.deepcopy(model)), table)
    bk.set_domain(swapped, domain)
    assert error(swapped, x, expected) < tolerance
    assert error(bk.plan(swapped, x, domain), x, expected) < tolerance


def lengths(table: ChannelTable, domain: str = "default") -> dict[str, int]:
    """How many channels each layer with a list reads."""
    return {name: len(lists.in_index) for name, lists in table[domain].items() if lists.in_index is not None}
