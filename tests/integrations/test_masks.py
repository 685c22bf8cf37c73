"""Masks and zeros of other tools, right, wrong and partial: the masked network's result, or a message that names it.

The reference is the dense network with masks multiplied into its weights, in float64 and PyTorch's own operations.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import bap_kernels as bk
from bap_kernels import ChannelTable
from tests.networks import Block, randomise, unit

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


@pytest.fixture
def net() -> Net:
    return randomise(Net())  # type: ignore[return-value]


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
        (None, TypeError, "expected `model` to be a network, got NoneType"),
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
