"""Masks of other tools, right, wrong and partial: the masked network's result, or a message that names it."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor

import bap_kernels as bk
from bap_kernels import ChannelTable
from tests.integrations.pruned import Net, X, assert_equals, error, lengths, masked_dense
from tests.networks import randomise

DTYPES = [torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn]


@pytest.mark.parametrize("shape", ["list", "(C,)", "sparse", "weight", "(1, C, 1, 1)", *map(str, DTYPES)])
def test_masks_of_input_channels_in_any_form(net: Net, shape: str) -> None:
    kept = torch.rand(16, generator=torch.Generator().manual_seed(1)) < 0.5
    mask: Any = kept
    if shape == "list":
        mask = kept.tolist()
    elif shape == "sparse":
        mask = kept.float().to_sparse()
    elif shape == "weight":
        mask = kept.view(1, -1, 1, 1).expand(5, -1, 3, 3)
    elif shape == "(1, C, 1, 1)":
        mask = kept.view(1, -1, 1, 1)
    elif shape.startswith("torch."):
        mask = kept.to(getattr(torch, shape.removeprefix("torch.")))
    dense = masked_dense(net, {"last": kept})
    for model in (net, None):
        table = ChannelTable.from_masks({"default": {"last": mask}}, model=model)
        assert lengths(table) == {"last": int(kept.sum())}
        assert_equals(net, table, dense)


@pytest.mark.parametrize("seed", range(4))
def test_random_masks_of_domains_that_miss_layers(seed: int) -> None:
    """Some layers of some domains, from all channels to none; the rest stays whole."""
    net, generator = randomise(Net(), seed), torch.Generator().manual_seed(seed)
    masks: dict[str, dict[str, Tensor]] = {}
    for domain in ("birds", "cars", "empty"):
        masks[domain] = {}
        for name in ("stem.0", "block.conv1", "block.conv2", "shared", "last"):
            share, present = torch.rand(2, generator=generator).tolist()
            if domain != "empty" and present < 0.7:
                channels = net.get_submodule(name).in_channels
                masks[domain][name] = torch.rand(channels, generator=generator) < share * 1.4 - 0.2  # type: ignore[arg-type]
    masks["cars"]["last"] = torch.zeros(16)
    table = ChannelTable.from_masks(masks, model=net)
    for domain, its_masks in masks.items():
        assert_equals(net, table, masked_dense(net, its_masks), domain)


def _some(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(2)) < 0.5


def _whole_filters(groups: int = 1) -> Tensor:
    mask = torch.ones(5, 16, 3, 3) if groups == 1 else torch.ones(16, 1, 3, 3)
    mask[[1, 3]] = 0
    return mask


@pytest.mark.parametrize(
    ("layer", "mask", "note"),
    [
        ("last", _whole_filters(), "reads 16 of 16; 2 of 5 filters are masked, which has no effect without `both`"),
        ("last", _some(5, 16, 3, 3), "reads 16 of 16; 3.. single weights are masked, which has no effect"),
        ("depthwise", _whole_filters(16), "reads 16 of 16; 2 of 16 filters are masked, which has no effect without"),
    ],
    ids=["filters", "single", "depthwise"],
)
def test_masks_beyond_lists_warn_until_they_are_multiplied_in(net: Net, layer: str, mask: Tensor, note: str) -> None:
    masks, dense = {"default": {layer: mask}}, masked_dense(net, {layer: mask})
    with pytest.warns(UserWarning, match=rf"masks of 1 layers also zero .* of '{layer}' in .* the masked network's"):
        table = ChannelTable.from_masks(masks, model=net)
    assert re.match(note, table.notes["default"][layer])
    with pytest.warns(UserWarning, match="multiply the masks in, and give `model`, in which they are looked up"):
        ChannelTable.from_masks(masks)
    with torch.no_grad():
        net.get_submodule(layer).weight.mul_(mask)  # type: ignore[operator]
    assert_equals(net, ChannelTable.from_masks(masks, model=net), dense)


@torch.no_grad()
@pytest.mark.parametrize("layer", ["last", "depthwise"])
@pytest.mark.parametrize("bias", [False, True])
def test_masks_of_filters_give_out_lists_which_drop_the_bias(net: Net, layer: str, bias: bool) -> None:
    mask = _whole_filters(1 if layer == "last" else 16)
    conv: Any = net.get_submodule(layer)
    masks = {"default": {layer: mask}}
    if bias:
        with pytest.warns(UserWarning, match=f"the first 2 of '{layer}'"):
            ChannelTable.from_masks(masks, both=True, model=net)
    conv.bias[[1, 3]] = 0
    table = ChannelTable.from_masks(masks, both=True, model=net)
    model = bk.attach_(bk.swap_(copy.deepcopy(net), layer_type=bk.nn.MaskedConv2d), table)
    bk.set_domain(model, "default")
    expected = masked_dense(net, {layer: mask})(X.double())
    assert error(model, X, expected) < 1e-5
    assert error(bk.plan(model, X, "default"), X, expected) < 1e-5


@pytest.mark.parametrize(
    ("masks", "kind", "message"),
    [
        ({}, ValueError, "got no domain"),
        ({"last": torch.ones(16)}, TypeError, r"got 'last': Tensor. Hint: .* go into \{'default': masks\}"),
        ({0: {"last": [1] * 16}}, TypeError, "got 0: dict"),
        ({"a": {0: [1] * 16}}, TypeError, "got 0 for the name of a layer in domain 'a'"),
        (
            {"a": {"last": torch.ones(16, device="meta")}},
            ValueError,
            "to hold values, got a tensor on the meta",
        ),
        ({"a": {"last": [[1, 0], [1]]}}, TypeError, "got list for layer 'last' in domain 'a': "),
        ({"a": {"last": None}}, TypeError, "got NoneType for layer 'last'"),
        ({"a": {"last": [0, 2, 5]}}, ValueError, "0 and 1 only, got 2 for .* channel numbers go into ChannelLists"),
        ({"a": {"last": torch.ones(16) - 2}}, ValueError, "0 and 1 only, got -1.0 for layer 'last'"),
        ({"a": {"last": [1, 0]}}, ValueError, r"shape \(16,\) or \(5, 16, 3, 3\) for layer 'last' .*, got \(2,\)"),
        ({"a": {"last": torch.ones(16, 5, 3, 3)}}, ValueError, r"got \(16, 5, 3, 3\)"),
        ({"a": {"module.last": [1] * 16}}, ValueError, "no such layer for .* Hint: they are stem.0, side.0, .*, ..."),
        ({"a": {"depthwise": [0, 1] * 8}}, ValueError, "groups=16, got one that keeps 8 of 16 .* Hint: mask the layer"),
        ({"a": {"grouped": [0, 1] * 8}}, ValueError, "groups=4, got one that keeps 8 of 16 for layer 'grouped'"),
    ],
)
def test_wrong_masks_are_refused_by_name(net: Net, masks: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=rf"ChannelTable\.from_masks\(\): expected `masks` .*{message}"):
        ChannelTable.from_masks(masks, model=net)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"last": [1, 0]}, "masks of 16 input channels for layer 'last' in domain 'a', got 2"),
        ({"last": [1] * 15}, "masks of 16 input channels for layer 'last' in domain 'a', got 15"),
        ({"last": torch.ones(16, 5, 3, 3)}, "masks of 16 input channels for layer 'last' in domain 'a', got 5"),
        ({"last": torch.ones(6, 16, 3, 3)}, "masks of 5 output channels for layer 'last' in domain 'a', got 6"),
        ({"shared": [1] * 8 + [0] * 8, "again": [1] * 16}, "one list for the layer that is both 'shared' and 'again'"),
        ({"grouped": torch.ones(16, 4, 1, 1)}, "'grouped' in domain 'a', which cannot be swapped: groups=4"),
        ({"norm": [1] * 16}, "swapped layers, got 'norm' in domain 'a'"),
    ],
)
def test_masks_without_a_model_are_compared_when_they_are_attached(net: Net, masks: Any, message: str) -> None:
    table = ChannelTable.from_masks({"a": masks})
    with pytest.raises(ValueError, match=rf"attach_\(\): expected .*{message}"):
        bk.attach_(bk.swap_(net), table)


def test_masks_are_compared_when_batch_norms_order_the_domains(net: Net) -> None:
    model = bk.swap_(bk.nn.switch_(net, ["cars", "birds"]))
    table = ChannelTable.from_masks({"birds": {"last": [1, 0]}, "cars": {"last": [1] * 16}})
    with pytest.raises(ValueError, match=r"masks of 16 input channels for layer 'last' in domain 'birds'"):
        bk.attach_(model, table)
