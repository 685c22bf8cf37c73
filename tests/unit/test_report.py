"""The report per layer: what is kept, counted and chosen."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bap_kernels as bk
from tests.unit.networks import Inverted, Residual, randomise
from tests.unit.test_plan import swapped


def test_figures() -> None:
    model = bk.swap_(nn.Sequential(nn.Conv2d(8, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6)).eval())
    bk.attach_(model, {"a": {"0": bk.ChannelLists([1, 5, 6])}})
    bk.set_domain(model, "a")
    with bk.use_backend("aten"):
        first, second = bk.report(model, torch.randn(2, 8, 10, 12)).layers
    assert first.reads == (3, 8)
    assert first.writes == (6, 6)
    assert first.macs == (2 * 120 * 6 * 3 * 9, 2 * 120 * 6 * 8 * 9)
    assert first.bytes == (4 * (240 * 3 + 240 * 6 + 6 * 27), 4 * (240 * 8 + 240 * 6 + 6 * 72))
    assert second.macs == (2 * 80 * 6 * 9,) * 2
    assert first.backend == "aten"
    assert first.why.startswith("named by use_backend")
    assert "depthwise" in second.why
    assert first.seconds > 0
    assert first.dense_seconds > 0


def test_auto_says_what_it_measured() -> None:
    model, _ = swapped(randomise(Residual()), 0.5, 0)
    bk.set_domain(model, "a")
    with bk.use_backend("auto"):
        found = bk.report(model, torch.randn(2, 3, 16, 16))
    assert [layer.name for layer in found.layers][:3] == ["stem.0", "a1.0", "a2"]
    assert "measured in us: " in found.layers[1].why
    assert found.layers[1].backend in found.layers[1].why
    text = str(found)
    assert f"{len(found.layers)} layers, {sum(layer.macs[0] for layer in found.layers):,} of" in text
    assert "6/12" in text


def test_a_layer_that_runs_twice_and_one_that_runs_not() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(self.a(x).relu_())

    model = bk.swap_(Twice().eval())
    assert [layer.name for layer in bk.report(model, torch.randn(1, 3, 4, 4)).layers] == ["a", "a"]
    assert not model.a._forward_hooks


def test_errors() -> None:
    x = torch.randn(1, 3, 16, 16)
    with pytest.raises(ValueError, match=r"report\(\): expected `model` to have swapped layers, got none"):
        bk.report(Inverted().eval(), x)
    model, _ = swapped(randomise(Residual()), 0.5, 0)
    with pytest.raises(ValueError, match=r"report\(\): expected `model` to be a network of layers, got a planned one"):
        bk.report(bk.plan(model, x, "a"), x)
    with pytest.raises(ValueError, match=r"report\(\): expected `model` to be in eval mode, got training mode"):
        bk.report(model.train(), x)
