"""attach_ and set_domain on whole models."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

import bap_kernels as bk
from bap_kernels import ChannelLists, ChannelTable
from bap_kernels.nn import GatheredConv2d, domains
from tests.networks import Block
from tests.nn.test_swap import Net, masked_by_hand


def test_each_domain_computes_with_its_own_lists() -> None:
    dense = Net().eval()
    model = bk.swap_(copy.deepcopy(dense))
    table = ChannelTable.random(model, ["a", "b", "c"], 0.5)
    assert bk.attach_(model, table) is model
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(model(x), dense(x))
    for domain in ("a", "b", "c", "a"):
        bk.set_domain(model, domain)
        expected = masked_by_hand(dense, table, domain)(x)
        assert not torch.allclose(expected, dense(x))
        torch.testing.assert_close(model(x), expected)
    bk.set_domain(model, None)
    torch.testing.assert_close(model(x), dense(x))


def test_layers_that_a_domain_does_not_name_stay_dense() -> None:
    model = bk.swap_(Net())
    bk.attach_(model, {"a": {"stem": ChannelLists([0])}, "b": {"blocks.0.conv2": ChannelLists([1])}})
    bk.set_domain(model, "a")
    assert model.stem.channels == ChannelLists([0])
    assert model.blocks[0].conv2.channels == ChannelLists()
    bk.set_domain(model, "b")
    assert model.stem.channels == ChannelLists()
    assert model.blocks[0].conv2.channels == ChannelLists([1])


def test_attach_replaces_what_was_there() -> None:
    model = bk.swap_(Net())
    bk.attach_(model, {"a": {"stem": ChannelLists([0])}})
    bk.set_domain(model, "a")
    bk.attach_(model, {"b": {"stem": ChannelLists([1])}})
    assert model.stem.channels == ChannelLists()
    bk.set_domain(model, "b")
    assert model.stem.channels == ChannelLists([1])
    with pytest.raises(ValueError, match=r"one of \['b'\], got 'a'"):
        bk.set_domain(model, "a")


@pytest.mark.parametrize(
    ("lists", "error", "message"),
    [
        (
            {"nowhere": ChannelLists()},
            ValueError,
            r"got 'nowhere' in domain 'd', which is not in the model. Hint: .*stem",
        ),
        ({"head": ChannelLists()}, ValueError, r"got 'head' in domain 'd', which cannot be swapped: Linear is no"),
        ({"blocks.2.conv1": ChannelLists()}, ValueError, r"cannot be swapped: groups=4"),
        ({"blocks.0.conv2": ChannelLists()}, ValueError, r"which was not swapped. Hint: call swap_ on it"),
        ({"stem": ChannelLists([3])}, IndexError, r"`in_index` of layer 'stem' to hold .* 0 to 2, got 3"),
        ({"blocks.1.conv1": ChannelLists([3])}, ValueError, r"`out_index` of layer 'blocks.1.conv1' to equal"),
    ],
    ids=["unknown", "linear", "groups", "filtered", "range", "depthwise"],
)
def test_attach_errors_change_nothing(lists, error, message) -> None:
    model = bk.swap_(Net(), lambda module, name: name != "blocks.0.conv2")
    bk.attach_(model, {"a": {"stem": ChannelLists([0])}})
    with pytest.raises(error, match=message):
        bk.attach_(model, {"d": {"blocks.0.conv1": ChannelLists([1]), **lists}})
    assert model.stem.lists == {"a": ChannelLists([0])}
    assert model.blocks[0].conv1.lists == {"a": ChannelLists()}


def test_attach_says_that_a_switched_layer_can_be_swapped() -> None:
    model = bk.nn.switch_(bk.swap_(Net(), lambda module, name: name == "stem"), ["a"])
    with pytest.raises(ValueError, match=r"got 'blocks\.0\.conv2' .* was not swapped\. Hint: call swap_ on it"):
        bk.attach_(model, {"a": {"blocks.0.conv2": ChannelLists()}})


def test_attach_needs_swapped_layers() -> None:
    with pytest.raises(ValueError, match=r"`model` to have swapped layers, got none. Hint: call swap_\(model\) first"):
        bk.attach_(Net(), {"a": {}})


def test_set_domain_errors_change_nothing() -> None:
    model = bk.swap_(Net())
    with pytest.raises(ValueError, match=r"`model` to have lists, got none. Hint: call swap_, then attach_"):
        bk.set_domain(model, "a")
    bk.attach_(model, {"a": {"stem": ChannelLists([0])}, "b": {}})
    bk.set_domain(model, "a")
    with pytest.raises(ValueError, match=r"`name` to be one of \['a', 'b'\], got 'c'"):
        bk.set_domain(model, "c")
    with pytest.raises(IndexError, match=r"domain numbers from 0 to 1, in the order of \['a', 'b'\], got 2"):
        bk.set_domain(model, torch.tensor([0, 2]))
    # The last layer lacks what the first has.
    model.blocks[2].conv2.attach({"a": ChannelLists()})
    with pytest.raises(ValueError, match=r"one of \['a'\], got 'b'"):
        bk.set_domain(model, "b")
    assert model.stem.channels == ChannelLists([0])


def test_layers_with_fixed_lists_keep_them() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 1), GatheredConv2d(8, 8, 1, channels=ChannelLists([5])))
    bk.swap_(model)
    model[0].attach({"a": ChannelLists([1])})
    bk.set_domain(model, "a")
    assert model[0].channels == ChannelLists([1])
    assert model[1].channels == ChannelLists([5])


def _attached() -> nn.Module:
    model = bk.swap_(Net())
    bk.attach_(model, {"a": {"blocks.0.conv2": ChannelLists([0])}, "b": {"blocks.0.conv2": ChannelLists([1])}})
    bk.set_domain(model, "a")
    return model


def test_set_domain_sees_replaced_and_added_layers() -> None:
    model = _attached()
    fresh = bk.swap_(Block(16))
    fresh.conv2.attach({"a": ChannelLists([2]), "b": ChannelLists([3])})
    model.blocks[0] = fresh
    bk.set_domain(model, "b")
    assert fresh.conv2.channels == ChannelLists([3])

    extra = GatheredConv2d(16, 16, 1)
    extra.attach({"a": ChannelLists([4]), "b": ChannelLists([5])})
    model.blocks[0].bn1.extra = extra
    bk.set_domain(model, "a")
    assert extra.channels == ChannelLists([4])
    del model.blocks[0].bn1.extra
    bk.set_domain(model, "b")
    assert extra.channels == ChannelLists([4])


def test_set_domain_sees_lists_attached_to_a_part() -> None:
    model = _attached()
    bk.attach_(model.blocks, {"a": {"0.conv2": ChannelLists([8])}, "b": {"0.conv2": ChannelLists([9])}})
    bk.set_domain(model, "b")
    assert model.blocks[0].conv2.channels == ChannelLists([9])


def test_set_domain_walks_an_unchanged_model_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Counted(domains._Layers):
        def __init__(self, model: nn.Module) -> None:
            made.append(model)
            super().__init__(model)

    monkeypatch.setattr(domains, "_Layers", Counted)
    model = bk.swap_(Net())
    bk.attach_(model, {"a": {}, "b": {}})
    for name in ("a", "b", None, "a"):
        bk.set_domain(model, name)
    assert made == [model]


def test_copies_switch_on_their_own() -> None:
    model = _attached()
    other = copy.deepcopy(model)
    bk.set_domain(other, "b")
    assert model.blocks[0].conv2.channels == ChannelLists([0])
    assert other.blocks[0].conv2.channels == ChannelLists([1])


@pytest.mark.parametrize("root", [False, True], ids=["model", "layer"])
def test_switching_keeps_no_model_alive(root: bool) -> None:
    model = _attached()
    if root:
        model = model.blocks[0].conv2
        bk.set_domain(model, "a")
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_moves_between_devices_keep_the_domain() -> None:
    model = _attached()
    model.to("meta")
    bk.set_domain(model, "b")
    assert model.blocks[0].conv2.channels.in_index.is_meta
    model.to_empty(device="cpu")
    assert model.blocks[0].conv2.channels.in_index.tolist() == [1]


def test_training_leaves_off_weights_alone() -> None:
    model = bk.swap_(nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)))
    bk.attach_(model, {"a": {"1": ChannelLists([1, 2, 6])}})
    bk.set_domain(model, "a")
    before = model[1].weight.detach().clone()
    model(torch.rand(2, 8, 4, 4)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    changed = (model[1].weight != before).flatten(2).any(2).any(0)
    assert changed.nonzero().flatten().tolist() == [1, 2, 6]
