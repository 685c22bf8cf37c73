"""The report per layer: what is kept, counted and chosen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import bap_kernels as bk
from bap_kernels.plan.report import NetworkReport
from bap_kernels.plan.roofline import Roofline, limit_of, measured_roofline
from tests.networks import Inverted, Residual, randomise
from tests.plan.test_planned import swapped


def test_channels_work_and_bytes() -> None:
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
    assert second.why.startswith("named by use_backend")
    assert first.seconds > 0
    assert first.dense_seconds > 0


def test_auto_reports_its_measurements() -> None:
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


def test_layers_that_run_twice_or_never() -> None:
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


PEAKS = Roofline(1e11, 1e10, 2e-6)
HALF = (500_000_000, 1_000_000_000)


# Why a layer at half of its work takes 0.9 of dense's time; arithmetic alone takes 10 ms of it, the bytes 1 ms.
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "the smaller call is less efficient: 56% of the roofline, dense 100%"),
        ({"times": (11e-3, 20e-3)}, ""),
        ({"macs": (HALF[1], HALF[1]), "times": (30e-3, 20e-3)}, "it keeps all of its work"),
        ({"backend": "dense"}, "no way to skip channels was faster than the dense convolution"),
        ({"macs": (5000, 10000), "times": (9e-6, 10e-6)}, "launch-bound: the smallest call takes 2 of its 9 us"),
        ({"moved": (150_000_000, 200_000_000)}, "memory-bound: its work falls to 50%, its bytes to 75% only"),
        # Its bytes fall as its work does, so they are not what is left.
        ({"moved": (150_000_000, 300_000_000)}, "the smaller call is less efficient: 83% of the roofline, dense 150%"),
        ({"results": 8}, "too narrow: it writes 8 channels, fewer than a vector holds"),
        ({"products": 3}, "too narrow: each result sums 3 products only"),
    ],
)
def test_what_limits_a_layer(changes: dict[str, Any], expected: str) -> None:
    facts = {"backend": "native", "macs": HALF, "moved": (10_000_000, 15_000_000), "times": (18e-3, 20e-3)}
    facts |= {"results": 64, "products": 576, **changes}
    assert limit_of(PEAKS, **facts) == expected


def test_peaks_of_this_machine() -> None:
    peaks = measured_roofline(torch.float32, torch.get_num_threads())
    # Units, not speeds: how busy the machine is must not matter.
    assert 1e4 < peaks.flop_per_s < 1e16
    assert 1e4 < peaks.bytes_per_s < 1e14
    assert 1e-8 < peaks.call_s < 100
    assert measured_roofline(torch.float32, torch.get_num_threads()) is peaks
    model = bk.swap_(nn.Sequential(nn.Conv2d(8, 6, 3)).eval())
    (layer,) = bk.report(model, torch.randn(1, 8, 9, 9)).layers
    assert layer.roofline_fraction == pytest.approx(peaks.fraction(layer.macs[0], layer.bytes[0], layer.seconds))
    assert f"{layer.roofline_fraction:.0%}" in str(NetworkReport((layer,)))
    with pytest.warns(DeprecationWarning, match=r"LayerReport\.roof_share is deprecated; use `roofline_fraction`"):
        assert layer.roof_share == layer.roofline_fraction
