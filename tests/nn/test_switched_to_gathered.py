"""From switches to lists on whole models: ChannelTable.from_switches, and swap_ of a switched model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import bap_kernels as bk
from bap_kernels import ChannelTable
from bap_kernels.nn import GatheredConv2d, SwitchedConv2d, switch_
from tests.nn.test_convert import NAMES, SWITCHED, Net, names_of, trained

pytestmark = pytest.mark.usefixtures("aten")


def test_gathered_model_computes_what_the_switched_one_does() -> None:
    model = trained()
    table = ChannelTable.from_switches(model)
    assert list(table) == NAMES
    assert list(table["a"]) == SWITCHED
    x = torch.randn(2, 3, 8, 8)
    expected = {}
    for name in NAMES:
        bk.set_domain(model, name)
        expected[name] = model(x)
    assert not torch.allclose(expected["a"], expected["c"])
    bk.set_domain(model, "b")

    gathered = bk.swap_(copy.deepcopy(model))
    assert names_of(gathered, GatheredConv2d) == SWITCHED
    assert torch.equal(gathered(x), expected["b"])
    for _ in range(2):
        for name in NAMES:
            bk.set_domain(gathered, name)
            torch.testing.assert_close(gathered(x), expected[name])
            assert gathered.blocks[0].conv2.channels == table[name]["blocks.0.conv2"]
        # The same through the table.
        bk.attach_(gathered, table)

    # A plain model with one domain's batch norm and classifier takes the lists too.
    plain = Net().eval()
    state = {key: value for key, value in model.state_dict().items() if "domains." not in key}
    for key, value in model.state_dict().items():
        if ".domains.c." in key and not key.endswith("score"):
            state[key.replace("domains.c.", "")] = value
    plain.load_state_dict(state, strict=True)
    bk.set_domain(bk.attach_(bk.swap_(plain), table), "c")
    torch.testing.assert_close(plain(x), expected["c"])


def test_density_and_random_tables_of_a_switched_model() -> None:
    model = switch_(Net(), ["a"], lambda module, name: name == "blocks.0.conv1")
    with torch.no_grad():
        model.blocks[0].conv1.domains["a"].score[:4] = 0
    assert ChannelTable.from_switches(model).density(model) == {"a": (0.75, 1.0)}
    assert list(ChannelTable.random(model, ["a"])["a"]) == ["blocks.0.conv1"]


def test_depthwise_layers_keep_their_switches() -> None:
    model = switch_(nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, groups=8)), ["a"]).eval()
    with torch.no_grad():
        model[1].domains["a"].score[2] = 0
    bk.set_domain(model, "a")
    x = torch.randn(1, 8, 5, 5)
    expected = model(x)
    assert list(ChannelTable.from_switches(model)["a"]) == ["0"]
    assert bk.nn.skipped(model) == {"1": "a depthwise layer with switches writes its bias to channels that are off"}
    bk.swap_(model)
    assert [type(layer) for layer in model] == [GatheredConv2d, SwitchedConv2d]
    bk.set_domain(model, "a")
    torch.testing.assert_close(model(x), expected)


def test_table_from_switches_errors() -> None:
    with pytest.raises(ValueError, match=r"`model` to have switched layers, got none. Hint: call nn.switch_"):
        ChannelTable.from_switches(bk.swap_(Net()))
    model = switch_(Net(), NAMES)
    model.stem.add_domain("d")
    with pytest.raises(
        ValueError, match=r"the domains \['a', 'b', 'c', 'd'\], got \['a', 'b', 'c'\] for 'blocks.0.conv1'"
    ):
        ChannelTable.from_switches(model)
