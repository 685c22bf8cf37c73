"""Zeros of other tools, from_weights: lists that change nothing, or a message that names what is wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import bap_kernels as bk
from bap_kernels import ChannelTable
from tests.integrations.pruned import Net, X, assert_equals, error, lengths, masked_dense


def _slices(factor: float) -> Callable[[Net], Any]:
    def change(net: Net) -> None:
        net.last.weight[:, [1, 4]] *= factor

    return change


def _taps(net: Net) -> None:
    net.last.weight[:, [1, 4], :, 1:] = 0


def _filters(net: Net) -> None:
    """Filters of zeros whose norms have positive shifts: constants behind them."""
    net.stem[0].weight[[2, 3]] = 0
    net.stem[1].running_mean[[2, 3]] = 0
    net.stem[1].bias[[2, 3]] = torch.tensor([0.25, -0.25])


def _one_term(net: Net) -> None:
    """Zeros in one term of a sum alone."""
    net.block.conv2.weight[5] = 0
    net.block.conv2.bias[5] = 0


def _scales(net: Net) -> None:
    net.stem[1].weight[[0, 1]] = 0
    net.stem[1].bias[[0, 1]] = torch.tensor([0.5, -0.5])
    net.side[1].weight[3], net.side[1].bias[3] = 0, -1


def _halved(dtype: torch.dtype) -> Callable[[Net], Any]:
    def change(net: Net) -> Net:
        net.last.weight[:, [1, 4]] = 0
        net.last.weight[:, 7] *= 1e-3
        return net.to(dtype)

    return change


def _everything(net: Net) -> None:
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.zero_()


def _groups(net: Net) -> None:
    """All that the shared layer reads of one group is zero, and some of what the depthwise layer gives."""
    net.grouped.weight[4:8], net.grouped.bias[4:8] = 0, 0
    net.depthwise.weight[3] = 0
    net.norm.weight[9], net.norm.bias[9] = 0, -1


@pytest.mark.parametrize(
    ("change", "reads"),
    [
        (_slices(0.0), {"last": 14}),
        (_slices(-0.0), {"last": 14}),
        (_slices(1e-8), {}),
        (_slices(1e-42), {}),
        (_taps, {}),
        (_filters, {"block.conv1": 11}),
        (_one_term, {}),
        (_scales, {"block.conv1": 11}),
        (_halved(torch.bfloat16), {"last": 14}),
        (_halved(torch.float16), {"last": 14}),
        (_everything, {"stem.0": 0, "side.0": 0, "block.conv1": 0, "block.conv2": 0, "shared": 0, "last": 0}),
        (_groups, {}),
    ],
    ids=["zeros", "-0", "1e-8", "denormal", "taps", "filters", "sum", "scales", "bf16", "fp16", "all", "groups"],
)
@pytest.mark.filterwarnings("ignore:.*no channel can be left out:UserWarning")
def test_zeros_give_lists_that_change_nothing(net: Net, change: Callable[[Net], Any], reads: dict[str, int]) -> None:
    with torch.no_grad():
        model = change(net) or net
    table = ChannelTable.from_weights(model, example_input=X.to(next(model.parameters()).dtype))
    assert lengths(table) == reads
    assert_equals(model, table, copy.deepcopy(model))


def test_nearly_zero_slices_are_read_and_named(net: Net) -> None:
    with torch.no_grad():
        net.last.weight[:, [1, 4]] *= 1e-8
    with pytest.warns(UserWarning, match="0% .* are zero, and 2 slices for a channel are nearly zero, which does not"):
        table = ChannelTable.from_weights(net)
    assert table.notes["default"]["last"] == "reads 16 of 16; nearly zero slices of the weight, which are read: 2"


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.filterwarnings("ignore:.*no channel can be left out:UserWarning")
def test_parameters_of_torch_prune_count_as_masked(net: Net, structured: bool) -> None:
    """Also of norms, of biases, of a layer that is pruned twice, and of one under two names."""
    if structured:
        prune.ln_structured(net.last, "weight", 5, n=2, dim=1)
        prune.ln_structured(net.last, "weight", 3, n=2, dim=1)
        prune.ln_structured(net.stem[0], "weight", 4, n=2, dim=0)
        prune.l1_unstructured(net.stem[1], "weight", 6)
        prune.l1_unstructured(net.stem[1], "bias", 6)
        prune.random_structured(net.shared, "weight", 3, dim=1)
    else:
        prune.global_unstructured([(net.last, "weight"), (net.shared, "weight")], prune.L1Unstructured, amount=0.5)
    table = ChannelTable.from_weights(net)
    assert ("last" in lengths(table)) is structured
    for module in (net.last, net.stem[0], net.shared, *([net.stem[1]] if structured else [])):
        for name in ("weight", "bias"):
            if f"{name}_orig" in module._parameters:
                prune.remove(module, name)
    assert_equals(net, table, copy.deepcopy(net))


@torch.no_grad()
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["zeroed slice", "filter behind a zeroed slice", "weight_orig", "running_var"])
def test_numbers_that_are_not_finite_are_refused(net: Net, place: str, value: float) -> None:
    """Masks hide them in some layers and not in others: 0 x NaN is NaN in PyTorch."""
    tensor, name, count = net.last.weight, "last.weight", 45
    net.last.weight[:, 2] = 0
    if place == "zeroed slice":
        net.last.weight[:, 3] = value
    elif place == "filter behind a zeroed slice":
        net.shared.weight[2], tensor, name, count = value, net.shared.weight, "shared.weight", 16
    elif place == "weight_orig":
        prune.ln_structured(net.last, "weight", 1, n=2, dim=1)
        net.last.weight_orig[:, 2], name = value, "last.weight_orig"  # type: ignore[index,operator]
    else:
        net.norm.running_var[1], tensor, name, count = value, net.norm.running_var, "norm.running_var", 1  # type: ignore[index,assignment]
    message = rf"hold finite numbers, got {count} of {tensor.numel()} that are NaN or infinite in {name}\. Hint"
    with pytest.raises(ValueError, match=rf"ChannelTable\.from_weights\(\): expected `model` to {message}"):
        ChannelTable.from_weights(net)


LISTS = {"last": [0, 2], "stem.0": [1], "side.0": [1, 2]}


@torch.no_grad()
@pytest.mark.parametrize("where", ["last.weight", "input 0"])
def test_a_plan_that_drops_what_is_not_finite_says_so(net: Net, where: str) -> None:
    model = bk.attach_(bk.swap_(net), {"default": {name: bk.ChannelLists(kept) for name, kept in LISTS.items()}})
    x = X.clone()
    if where == "input 0":
        x[:, 0] = float("nan")
    else:
        net.last.weight[:, 5] = float("nan")
    with pytest.raises(RuntimeError, match=rf"finite numbers, .*, got [0-9]+ of [0-9]+ that are NaN .* in {where}\. H"):
        bk.plan(model, x, "default")
    net.last.weight[:, 5] = 0
    masks = {name: [c in kept for c in range(net.get_submodule(name).in_channels)] for name, kept in LISTS.items()}  # type: ignore[arg-type]
    expected = masked_dense(net, masks)(X.double())
    assert error(bk.plan(model, x, "default", check=False), X, expected) < 1e-5


@pytest.mark.parametrize(
    ("model", "kind", "message"),
    [
        (None, TypeError, "expected `model` to be a torch.nn.Module, got NoneType"),
        ({"w": X}, TypeError, "got dict. Hint: load a state dict into its network first"),
        (torch.compile(nn.Conv2d(3, 3, 1)), TypeError, "of layers, got OptimizedModule. Hint: give its `_orig_mod`"),
        (nn.Conv2d(3, 3, 1, device="meta"), ValueError, "hold weights, got one on the meta device: weight"),
        (
            nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, device="meta")),
            ValueError,
            "hold weights, got one on the meta device: 1.weight",
        ),
        (nn.Sequential(nn.LazyConv2d(3, 1)), ValueError, "got a lazy one: 0.weight. Hint: call the model once"),
    ],
    ids=["None", "state dict", "compiled", "meta", "meta norm", "lazy"],
)
def test_what_holds_no_weights_is_refused(model: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=rf"ChannelTable\.from_weights\(\): .*{message}"):
        ChannelTable.from_weights(model)


def test_planned_networks_and_examples_for_names_are_refused(net: Net) -> None:
    with pytest.raises(TypeError, match=r"got PlannedNetwork\. Hint: give its `model`"):
        ChannelTable.from_weights(bk.plan(net, X))
    with pytest.raises(TypeError, match=r"`domain` to be a name, got Tensor\. Hint: an example goes"):
        ChannelTable.from_weights(net, X)  # type: ignore[arg-type]


@torch.no_grad()
def test_zeros_are_followed_as_in_eval_mode_and_plans_ask_for_it(net: Net) -> None:
    net.last.weight[:, 3] = 0
    net.train()
    table = ChannelTable.from_weights(net)
    assert net.training
    assert lengths(table) == {"last": 15}
    swapped = bk.attach_(bk.swap_(net), table)
    with pytest.raises(ValueError, match=r"plan\(\): .*eval mode, got 'Net' in training mode. Hint: call model.eval"):
        bk.plan(swapped, X, "default")
    assert_equals(net.eval(), table, copy.deepcopy(net))
