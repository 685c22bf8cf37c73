"""Layers are recognised by their base classes, not by their attributes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bap_kernels as bk
from bap_kernels.layer_kinds import DomainLayer, GatheredLayer, PlannedModel, SwitchedLayer

LAYERS = {
    "gathered": lambda: bk.nn.GatheredConv2d(4, 4, 1),
    "masked": lambda: bk.nn.MaskedConv2d(4, 4, 1),
    "switched": lambda: bk.nn.SwitchedConv2d(4, 4, 1, domains=["a"]),
    "batch norm": lambda: bk.nn.DomainBatchNorm2d(4, ["a"]),
    "linear": lambda: bk.nn.DomainLinear(4, {"a": 2}),
    "convolution": lambda: bk.nn.DomainConv2d.from_conv2d(nn.Conv2d(4, 2, 1), {"a": 2}),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_domain_layer_has_state_of_its_domain(kind: str) -> None:
    layer = LAYERS[kind]()
    assert isinstance(layer, DomainLayer)
    if isinstance(layer, GatheredLayer):
        layer.attach({"a": bk.ChannelLists([1, 2])})
    layer.set_domain("a")
    assert layer._state is layer._states()["a"]
    assert isinstance(layer, GatheredLayer) == (kind in ("gathered", "masked"))
    assert isinstance(layer, SwitchedLayer) == (kind == "switched")
    with pytest.raises(ValueError, match=r"set_domain\(\): expected `name` to be one of \['a'\], got 'b'"):
        layer.set_domain("b")
    assert layer._state is layer._states()["a"]


@pytest.mark.parametrize("kind", LAYERS)
def test_only_convolutions_work_without_a_domain(kind: str) -> None:
    layer = LAYERS[kind]()
    if isinstance(layer, (GatheredLayer, SwitchedLayer)):
        layer.set_domain(None)
        assert layer(torch.randn(1, 4, 2, 2)).shape == (1, 4, 2, 2)
    else:
        with pytest.raises(ValueError, match=r"expected `name` to be one of \['a'\], got None"):
            layer.set_domain(None)


def test_foreign_layer_with_equal_attributes_is_ignored() -> None:
    class Other(nn.Conv2d):
        domains, lists = {"a": None}, {}

        def channels(self, domain: str | None = None) -> bk.ChannelLists:
            return bk.ChannelLists([0])

    model = nn.Sequential(Other(8, 8, 1), nn.Conv2d(8, 8, 1))
    with pytest.raises(ValueError, match="expected `model` to have switched layers, got none"):
        bk.ChannelTable.from_switches(model)
    assert set(bk.ChannelTable.random(model, "a", 0.5)["a"]) == {"0", "1"}
    assert bk.domain_names(model) == []


def test_planned_model_is_recognised_by_its_class() -> None:
    model = bk.swap_(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1))).eval()
    bk.attach_(model, {"a": {"1": bk.ChannelLists([0, 3])}})
    planned = bk.plan(model, torch.randn(1, 4, 3, 3), "a")
    assert isinstance(planned, PlannedModel)

    class Other(nn.Module):
        def prepare_domain(self, name: str) -> None:
            raise AssertionError("called on a foreign module")

    bk.set_domain(nn.Sequential(planned, Other()), "a")
