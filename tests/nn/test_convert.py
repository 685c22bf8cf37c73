"""switch_, add_domain_ and set_domain on whole models."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import bap_kernels as bk
from bap_kernels import ChannelLists, ChannelTable
from bap_kernels.nn import DomainBatchNorm2d, DomainLinear, SwitchedConv2d, add_domain_, switch_
from bap_kernels.nn import domains as nn_domains
from tests.networks import Block

pytestmark = pytest.mark.usefixtures("aten")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3)
        self.bn = nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(Block(16), Block(16, groups=4), Block(16))
        self.squeeze = nn.Linear(16, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.squeeze(self.blocks(self.bn(self.stem(x))).mean((2, 3))))


NAMES = ["a", "b", "c"]
SWITCHED = ["stem", "blocks.0.conv1", "blocks.0.conv2", "blocks.1.conv2", "blocks.2.conv1", "blocks.2.conv2"]
NORMS = ["bn", "blocks.0.bn1", "blocks.1.bn1", "blocks.2.bn1"]


def names_of(model: nn.Module, kind: type[nn.Module]) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, kind)]


def _dense() -> Net:
    dense = Net()
    # Statistics that are not those of a new layer.
    for _ in range(2):
        dense(torch.rand(4, 3, 8, 8))
    return dense


def trained(heads: bool = True) -> nn.Module:
    """Another half of the channels, statistics and classifiers for each domain."""
    model = switch_(_dense(), NAMES, heads={"a": 5, "b": 7, "c": 5} if heads else None)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, SwitchedConv2d):
                for name in NAMES:
                    layer.domains[name].score.copy_(torch.randn(layer.in_channels) * 0.01 + 5e-3)
    for name in NAMES:
        bk.set_domain(model, name)
        model.train()(torch.rand(4, 3, 8, 8))
    return model.eval()


def test_replaces_what_it_can_and_computes_the_same() -> None:
    dense = _dense().eval()
    model = copy.deepcopy(dense)
    before = dict(model.named_parameters())
    assert switch_(model, NAMES) is model
    assert names_of(model, SwitchedConv2d) == SWITCHED
    assert names_of(model, DomainBatchNorm2d) == NORMS
    assert type(model.blocks[1].conv1) is nn.Conv2d
    assert type(model.head) is nn.Linear
    assert model.stem.weight is before["stem.weight"]
    x = torch.randn(2, 3, 8, 8)
    for name in NAMES:
        bk.set_domain(model, name)
        torch.testing.assert_close(model(x), dense(x))
    assert list(bk.nn.skipped(model)) == ["blocks.1.conv1", "head"]


def test_options_reach_the_layers() -> None:
    model = switch_(Net(), ["a"], threshold=0.5, initial=0.75, ste_every=4)
    switch = model.stem.domains["a"]
    assert (switch.threshold, switch.initial, switch.ste_every) == (0.5, 0.75, 4)
    assert switch.score.tolist() == [0.75] * 3


def test_filter_chooses_convolutions_and_batch_norms() -> None:
    seen = []

    def keep(module: nn.Module, name: str) -> bool:
        seen.append((type(module), name))
        return name not in ("stem", "bn")

    model = switch_(Net(), NAMES, keep)
    assert names_of(model, SwitchedConv2d) == SWITCHED[1:]
    assert names_of(model, DomainBatchNorm2d) == NORMS[1:]
    assert (nn.Conv2d, "stem") in seen
    assert (nn.BatchNorm2d, "bn") in seen
    assert len(seen) == len(SWITCHED) + len(NORMS) + 1


def test_heads_replace_the_last_linear_layer() -> None:
    model = Net()
    weight = model.head.weight
    switch_(model, NAMES, heads={"c": 5, "b": 7, "a": 2})
    assert names_of(model, DomainLinear) == ["head"]
    assert list(model.head.domains) == NAMES
    assert torch.equal(model.head.domains["c"].weight, weight)
    for name, size in (("a", 2), ("b", 7), ("c", 5)):
        bk.set_domain(model, name)
        assert model(torch.randn(2, 3, 8, 8)).shape == (2, size)


def test_shared_layers_stay_one_and_a_root_is_returned() -> None:
    conv, norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
    model = switch_(nn.Sequential(conv, norm, nn.Sequential(conv, norm)), ["a"])
    assert type(model[0]) is SwitchedConv2d
    assert model[2][0] is model[0]
    assert model[2][1] is model[1]
    assert ChannelTable.from_switches(model)["a"] == dict.fromkeys(["0", "2.0"], ChannelLists(range(8)))
    assert type(switch_(nn.Conv2d(4, 4, 1), ["a"])) is SwitchedConv2d
    assert type(switch_(nn.BatchNorm2d(4), ["a"])) is DomainBatchNorm2d


def test_converting_twice_replaces_only_what_is_left() -> None:
    model = switch_(Net(), NAMES, lambda module, name: name == "stem")
    stem = model.stem
    switch_(model, NAMES)
    assert model.stem is stem
    assert names_of(model, SwitchedConv2d) == SWITCHED
    with pytest.raises(ValueError, match="convolutions or batch norms to replace, got none"):
        switch_(switch_(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), NAMES), NAMES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["a.b"],), "switch_.*got 'a.b'"),
        (("birds",), r"switch_.*Hint: pass \['birds'\]"),
        (([],), "at least one name"),
        ((["a"], None, 5e-3, 1e-2, 0), "`ste_every`.*got 0"),
        ((["a"], None, 5e-3, 1e-2, 1, {"b": 3}), r"`heads` to name the domains \['a'\], got \['b'\]"),
    ],
)
def test_errors_change_nothing(arguments: tuple, message: str) -> None:
    model = Net()
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=message):
        switch_(model, *arguments)
    assert dict(model.named_modules()) == before
    with pytest.raises(ValueError, match=r"a torch.nn.Linear for `heads`, .*got none. Hint: put"):
        switch_(nn.Sequential(nn.Conv2d(3, 3, 3)), ["a"], heads={"a": 3})


def test_skipped_names_every_kind_of_layer_that_is_not_served() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1),
        nn.GroupNorm(2, 8),
        nn.GroupNorm(2, 8, affine=False),
        nn.BatchNorm2d(8),
        nn.InstanceNorm2d(8, affine=True),
        nn.ConvTranspose2d(8, 8, 1),
        nn.BatchNorm2d(8),
        nn.Flatten(2),
        nn.Conv1d(8, 8, 1),
        nn.Flatten(),
        nn.LayerNorm(8),
        nn.Linear(8, 2),
    )
    assert list(bk.nn.skipped(model)) == ["5", "8"]
    switch_(model, ["a"], lambda module, name: name != "6")
    found = bk.nn.skipped(model)
    assert list(found) == ["1", "4", "5", "6", "8", "10", "11"]
    for name, words in {
        "1": "GroupNorm: its scale and shift are shared by all domains",
        "4": "InstanceNorm2d: its scale and shift",
        "5": "ConvTranspose2d is no torch.nn.Conv2d",
        "6": "its statistics are shared by all domains",
        "8": "Conv1d is no",
        "10": "LayerNorm",
        "11": "see `heads` of switch_",
    }.items():
        assert words in found[name]
    assert "11" not in bk.nn.skipped(switch_(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Linear(8, 2)), ["a"], heads=True))


def test_says_what_stays_dense(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="bap_kernels"):
        switch_(Net(), ["a"])
    assert "switch_: 'blocks.1.conv1' stays dense: groups=4" in caplog.text


def test_plain_checkpoint_loads_strictly_in_one_call() -> None:
    dense = _dense().eval()
    model = switch_(Net(), NAMES, heads={"a": 5, "b": 7, "c": 5}).eval()
    model.load_state_dict(dense.state_dict(), strict=True)
    x = torch.randn(2, 3, 8, 8)
    for name in ("a", "c"):
        bk.set_domain(model, name)
        torch.testing.assert_close(model(x), dense(x))
    with pytest.raises(RuntimeError, match=r"Missing key.*stem.weight"):
        model.load_state_dict({key: value for key, value in dense.state_dict().items() if key != "stem.weight"})


@pytest.mark.parametrize(
    "duplicate",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: _loaded(model.state_dict()),
    ],
    ids=["deepcopy", "pickle", "state"],
)
def test_trained_model_travels(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model = trained()
    x = torch.randn(2, 3, 8, 8)
    expected = {}
    for name in NAMES:
        bk.set_domain(model, name)
        expected[name] = model(x)
    other = duplicate(model)
    for name in NAMES:
        bk.set_domain(other, name)
        assert torch.equal(other(x), expected[name])


def _loaded(state: dict[str, Tensor]) -> nn.Module:
    model = switch_(Net(), NAMES, heads={"a": 5, "b": 7, "c": 5}).eval()
    model.load_state_dict(state, strict=True)
    return model


def test_set_domain_reaches_every_layer_or_changes_none() -> None:
    model = trained()
    bk.set_domain(model, "b")
    layers = [layer for _, layer in bk.nn.domain_layers(model)]
    assert len(layers) == len(SWITCHED) + len(NORMS) + 1
    assert {layer.domain for layer in layers} == {"b"}
    for name in ("d", None, 3):
        with pytest.raises(ValueError, match=rf"`name` to be one of \['a', 'b', 'c'\], got {name!r}"):
            bk.set_domain(model, name)
    with pytest.raises(IndexError, match="domain numbers from 0 to"):
        bk.set_domain(model, torch.tensor([3]))
    # The last layer has a domain less; the first ones are not switched then.
    del model.head.domains["c"]
    with pytest.raises(ValueError, match=r"`name` to be one of \['a', 'b'\], got 'c'"):
        bk.set_domain(model, "c")
    assert {layer.domain for layer in layers} == {"b"}


def test_none_is_a_domain_of_convolutions_only() -> None:
    model = switch_(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)), ["a"])
    bk.set_domain(model, "a")
    bk.set_domain(model, None)
    assert model[0].domain is None


def test_lists_and_switches_in_one_model() -> None:
    model = switch_(Net(), ["a", "b"], lambda module, name: name != "stem")
    bk.swap_(model, lambda module, name: name == "stem")
    bk.attach_(model, {"a": {"stem": ChannelLists([0])}, "b": {}})
    bk.set_domain(model, "a")
    assert model.stem.channels == ChannelLists([0])
    assert model.bn.domain == "a"
    bk.attach_(model, {"a": {}})
    bk.set_domain(model, "a")
    with pytest.raises(ValueError, match=r"one of \['a'\], got 'b'"):
        bk.set_domain(model, "b")
    assert model.bn.domain == "a"


def test_domains_added_later_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained()
    made = []
    original = nn_domains._Layers

    class Counted(original):
        def __init__(self, model: nn.Module) -> None:
            made.append(model)
            super().__init__(model)

    monkeypatch.setattr(nn_domains, "_Layers", Counted)
    x = torch.randn(2, 3, 8, 8)
    bk.set_domain(model, "a")
    expected = model(x)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert add_domain_(model, "d", like="a", classes=5) is model
    add_domain_(model, "e", classes=9)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert torch.equal(model(x), expected)
    bk.set_domain(model, "d")
    model.head.domains["d"].load_state_dict(model.head.domains["a"].state_dict())
    assert torch.equal(model(x), expected)
    bk.set_domain(model, "e")
    assert model(x).shape == (2, 9)
    assert model.stem.channels() == ChannelLists(range(3))
    # An unchanged module tree is walked once; domains are no part of it.
    assert made == []
    model.extra = nn.ReLU()
    bk.set_domain(model, "a")
    assert made == [model]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "a", "classes": 3}, "expected `name` to be new, got 'a', which the model has"),
        ({"name": "d.e", "classes": 3}, "got 'd.e'"),
        ({"name": "d", "like": "x", "classes": 3}, r"`like` to be one of \['a', 'b', 'c'\], got 'x'"),
        ({"name": "d"}, "`classes` to be a number, as the model has a DomainLinear, got None"),
    ],
)
def test_adding_a_domain_errors_change_nothing(arguments: dict, message: str) -> None:
    model = trained()
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        add_domain_(model, **arguments)
    assert list(model.state_dict()) == before
    with pytest.raises(ValueError, match="`classes` to be None, as the model has no DomainLinear, got 3"):
        add_domain_(trained(heads=False), "d", classes=3)
    with pytest.raises(ValueError, match="layers with domains, got none"):
        add_domain_(Net(), "d")


def test_inactive_domains_do_not_move() -> None:
    model = trained().train()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(2):
        bk.set_domain(model, "b")
        optimiser.zero_grad()
        model(torch.randn(4, 3, 8, 8)).square().sum().backward()
        optimiser.step()
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    mine = {name for name, _ in bk.nn.domain_parameters(model, "b")}
    assert mine <= moved
    assert not any("domains." in name for name in moved - mine)
    assert "stem.weight" in moved
