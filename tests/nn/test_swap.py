"""swap_ on whole models."""

from __future__ import annotations

import copy
import logging
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bap_kernels as bk
from bap_kernels import ChannelLists, ChannelTable
from bap_kernels.nn import GatheredConv2d, MaskedConv2d
from tests.networks import Block


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3)
        self.blocks = nn.Sequential(Block(16), Block(16, groups=16), Block(16, groups=4))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


SWAPPED = ["stem", "blocks.0.conv1", "blocks.0.conv2", "blocks.1.conv1", "blocks.1.conv2", "blocks.2.conv2"]


def _gathered(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, GatheredConv2d)]


def masked_by_hand(dense: nn.Module, table: ChannelTable, domain: str) -> nn.Module:
    """The dense model with the weights of channels that are off set to zero: inputs, then outputs with their bias."""
    model = copy.deepcopy(dense)
    for name, lists in table[domain].items():
        conv = model.get_submodule(name)
        with torch.no_grad():
            if lists.in_index is not None and conv.groups == 1:
                off = torch.ones(conv.in_channels, dtype=torch.bool)
                off[lists.in_index.long()] = False
                conv.weight[:, off] = 0
            if lists.out_index is not None:
                off = torch.ones(conv.out_channels, dtype=torch.bool)
                off[lists.out_index.long()] = False
                conv.weight[off] = 0
                if conv.bias is not None:
                    conv.bias[off] = 0
    return model


def test_swaps_what_it_can_and_computes_the_same() -> None:
    dense = Net()
    model = copy.deepcopy(dense)
    assert bk.swap_(model) is model
    assert _gathered(model) == SWAPPED
    assert type(model.blocks[2].conv1) is nn.Conv2d
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(model.eval()(x), dense.eval()(x))
    assert bk.swap_(model) is model
    assert _gathered(model) == SWAPPED


def test_shares_parameters_mode_device_and_dtype() -> None:
    model = Net().double()
    model.blocks[0].eval()
    before = dict(model.named_parameters())
    bk.swap_(model)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert model.stem.training
    assert not model.blocks[0].conv1.training
    meta = bk.swap_(Net().to("meta"))
    assert meta(torch.empty(2, 3, 8, 8, device="meta")).shape == (2, 5)


def test_checkpoints_pass_both_ways() -> None:
    dense, model = Net().eval(), bk.swap_(Net()).eval()
    bk.attach_(model, ChannelTable.random(model, ["a"], 0.5))
    x = torch.randn(2, 3, 8, 8)
    assert list(model.state_dict()) == list(dense.state_dict())
    model.load_state_dict(dense.state_dict(), strict=True)
    torch.testing.assert_close(model(x), dense(x))
    other = Net().eval()
    other.load_state_dict(model.state_dict(), strict=True)
    torch.testing.assert_close(other(x), dense(x))


def test_filter_gets_module_and_name() -> None:
    model, seen = Net(), {}

    def keep(module: nn.Module, name: str) -> bool:
        seen[name] = module
        return name.endswith("conv2")

    stem = model.stem
    bk.swap_(model, keep)
    assert _gathered(model) == ["blocks.0.conv2", "blocks.1.conv2", "blocks.2.conv2"]
    assert seen["stem"] is stem
    assert list(seen) == [*SWAPPED[:5], "blocks.2.conv1", "blocks.2.conv2"]


def test_root_that_is_a_convolution() -> None:
    conv = nn.Conv2d(8, 4, 3)
    layer = bk.swap_(conv)
    assert type(layer) is GatheredConv2d
    assert layer.weight is conv.weight
    bk.attach_(layer, {"a": {"": ChannelLists([1, 2])}})
    bk.set_domain(layer, "a")
    assert layer.channels == ChannelLists([1, 2])


def test_shared_convolution_stays_one_layer() -> None:
    conv = nn.Conv2d(8, 8, 1)
    model = nn.ModuleDict({"a": conv, "b": nn.Sequential(nn.ReLU(), conv)})
    bk.swap_(model)
    assert type(model["a"]) is GatheredConv2d
    assert model["b"][1] is model["a"]
    bk.attach_(model, {"x": {"b.1": ChannelLists([3])}})
    assert model["a"].lists == {"x": ChannelLists([3])}
    bk.attach_(model, {"x": {"a": ChannelLists([4]), "b.1": ChannelLists([4])}})
    assert model["a"].lists == {"x": ChannelLists([4])}
    with pytest.raises(ValueError, match=r"one list for the layer that is both 'a' and 'b\.1', got two in domain 'x'"):
        bk.attach_(model, {"x": {"a": ChannelLists([4]), "b.1": ChannelLists([5])}})


class Special(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(x)


def test_what_cannot_be_swapped_is_left_alone_with_a_reason(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(
        Special(8, 8, 1),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1)),
        nn.utils.spectral_norm(nn.Conv2d(8, 8, 1)),
        nn.Conv2d(8, 8, 1, groups=2),
        nn.Conv2d(8, 8, 1),
    )
    before = list(model)
    with caplog.at_level(logging.INFO, logger="bap_kernels"):
        bk.swap_(model)
    assert [new is old for new, old in zip(model, before, strict=True)] == [True, True, True, True, False]
    reasons = bk.nn.skipped(model)
    assert list(reasons) == ["0", "1", "2", "3"]
    for reason, word in zip(
        reasons.values(), ["Special", "parametrized", "computed by a hook", "groups=2"], strict=True
    ):
        assert word in reason
        assert reason in caplog.text


class Wrapper(nn.Conv2d):
    """As mmcv's and detectron2's layers: empty inputs took another way in old versions of torch."""

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() == 0 and torch.__version__ < (1, 4):
            return x.new_empty(0)
        return super().forward(x)


class Padded(nn.Conv2d):
    """A subclass that is only made and shown in another way."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__(channels, channels, kernel, padding=kernel // 2)
        self.remark = "kept"

    def reset_parameters(self) -> None:
        nn.init.dirac_(self.weight)
        nn.init.zeros_(self.bias)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.kernel_size[0]}"


class Helpful(nn.Conv2d):
    def fan_in(self) -> int:
        return self.in_channels * self.kernel_size[0] ** 2


@torch.no_grad()
def test_subclasses_that_are_only_made_in_another_way_are_swapped() -> None:
    model, x = nn.Sequential(Padded(6, 3), nn.ReLU(), Padded(6, 5)).eval(), torch.randn(2, 6, 7, 7)
    nn.init.normal_(model[2].weight)  # type: ignore[arg-type]
    dense = [model[0].weight, model[2].weight]
    expected = model(x * torch.tensor([1, 0, 0, 1, 1, 0]).view(-1, 1, 1))
    bk.attach_(bk.swap_(model), {"birds": {"0": ChannelLists([0, 3, 4])}})
    bk.set_domain(model, "birds")
    assert [type(model[i]) for i in (0, 2)] == [GatheredConv2d] * 2
    assert [model[0].weight, model[2].weight] == dense
    assert model[0].remark == "kept"
    assert bk.nn.skipped(model) == {}
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(bk.plan(model, x, "birds")(x), expected)


@torch.no_grad()
@pytest.mark.parametrize(("cls", "name"), [(Wrapper, "forward"), (Helpful, "fan_in")])
def test_subclasses_with_methods_of_their_own_stay_and_are_named(cls: type[nn.Conv2d], name: str) -> None:
    model, x = nn.Sequential(nn.Conv2d(4, 6, 3), cls(6, 5, 1)).eval(), torch.randn(1, 4, 8, 8)
    reason = rf"{cls.__name__} is a subclass of torch.nn.Conv2d with its own {name}, and may compute something else"
    bk.swap_(model)
    assert type(model[1]) is cls
    assert list(bk.nn.skipped(model)) == ["1"]
    assert reason in bk.nn.skipped(model)["1"]
    assert f"not served: '1': {reason}" in str(bk.report(model, x))
    with pytest.raises(ValueError, match=rf"got '1' in domain 'birds', which cannot be swapped: {reason}"):
        bk.attach_(model, {"birds": {"1": ChannelLists([0, 2])}})
    # A plan computes it dense: calling it is one convolution with its own weight.
    assert bk.plan(model, x).lowered == ("0", "1")
    # The way out that the reason names.
    mask = torch.tensor([1, 0, 1, 0, 0, 0]).view(-1, 1, 1)
    expected = model[1](model[0](x) * mask)
    model[1].__class__ = nn.Conv2d
    bk.set_domain(bk.attach_(bk.swap_(model), {"birds": {"1": ChannelLists([0, 2])}}), "birds")
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(bk.plan(model, x, "birds")(x), expected)


def test_a_network_of_which_nothing_is_swapped_warns() -> None:
    model = nn.Sequential(Wrapper(4, 4, 1), nn.Conv2d(4, 4, 1, groups=2))
    with pytest.warns(UserWarning, match=r"swap_\(\): no convolution was replaced\. '0': Wrapper is .*; '1': groups=2"):
        bk.swap_(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bk.swap_(model, lambda module, name: False)
        bk.swap_(bk.swap_(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, groups=2))))


def _own_forward(module: nn.Module) -> nn.Module:
    """As wrappers do: the function goes on calling the module it was made for."""
    old = module.forward
    module.forward = lambda *args: old(*args)
    return module


@pytest.mark.parametrize("kind", [nn.Conv2d, bk.nn.GatheredConv2d, bk.nn.SwitchedConv2d])
def test_layers_with_their_own_forward_raise_and_nothing_changes(kind: type[nn.Module]) -> None:
    options = {"domains": ["a"]} if kind is bk.nn.SwitchedConv2d else {}
    model = nn.Sequential(nn.Conv2d(3, 4, 1), _own_forward(kind(4, 4, 1, **options)))
    before = list(model)
    message = rf"expected the layers of `model` to have the forward of their class, got '1', a {kind.__name__} on which"
    changes = [lambda: bk.nn.switch_(model, ["a"])] if kind is nn.Conv2d else []
    changes += [] if kind is bk.nn.GatheredConv2d else [lambda: bk.swap_(model)]
    for change in changes:
        with pytest.raises(NotImplementedError, match=message):
            change()
        assert list(model) == before
        assert "another forward was set on it" in bk.nn.skipped(model)["1"]
    make = before[1].to_gathered if kind is bk.nn.SwitchedConv2d else lambda: MaskedConv2d.from_conv2d(before[1])
    with pytest.raises(NotImplementedError, match="another forward was set on it"):
        make()
    # Left out on purpose.
    bk.swap_(model, lambda module, name: name != "1")
    assert type(model[0]) is bk.nn.GatheredConv2d
    assert model[1] is before[1]


def test_a_forward_set_after_the_swap_sees_the_lists() -> None:
    model = bk.attach_(bk.swap_(nn.Sequential(nn.Conv2d(3, 4, 1))), {"a": {"0": ChannelLists([1])}})
    bk.set_domain(model, "a")
    x = torch.randn(1, 3, 2, 2)
    expected = model(x)
    _own_forward(model[0])
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("switched", [False, True])
def test_recomputed_layers_are_replaced_and_stay_recomputed(switched: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))
    bk.nn.recompute_(model, lambda module, name: name == "1")
    if switched:
        bk.nn.switch_(model, ["a", "b"])
        with torch.no_grad():
            model[1].domains["a"].score[[0, 2, 3]] = 0
    bk.swap_(model)
    if not switched:
        bk.attach_(model, {"a": {"1": ChannelLists([1])}})
    bk.set_domain(model, "a")
    assert "forward" in model[1].__dict__
    x = torch.randn(1, 3, 2, 2, requires_grad=True)
    expected = F.conv2d(model[0](x)[:, 1:2], model[1].weight[:, 1:2], model[1].bias)
    torch.testing.assert_close(model(x), expected)


def test_masked_layers_take_out_lists_in_any_network() -> None:
    dense = Net().eval()
    model = bk.swap_(copy.deepcopy(dense), layer_type=MaskedConv2d)
    assert type(model.stem) is MaskedConv2d
    table = ChannelTable.random(model, ["a", "b"], 0.5, both=True)
    bk.attach_(model, table)
    x = torch.randn(2, 3, 8, 8)
    for domain in ("a", "b", "a"):
        bk.set_domain(model, domain)
        torch.testing.assert_close(model(x), masked_by_hand(dense, table, domain)(x))
