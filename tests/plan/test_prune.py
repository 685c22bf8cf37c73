"""Dropping what no domain uses leaves every domain's result as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import bap_kernels as bk
from bap_kernels.nn import MaskedConv2d
from tests.networks import LARGE, SMALL, Dense, Residual, random_network, randomise
from tests.plan.test_planned import assert_equal

# One domain among the two reads little, so that much can go.
DENSITIES = {"a": 0.3, "b": 0.15}


def with_lists(model: nn.Module, seed: int, both: bool = False) -> nn.Module:
    bk.swap_(model, layer_type=MaskedConv2d)
    tables = {
        name: bk.ChannelTable.random(model, [name], density, seed, both)[name] for name, density in DENSITIES.items()
    }
    return bk.attach_(model, tables)


def results(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    found = {}
    for domain in DENSITIES:
        bk.set_domain(model, domain)
        found[domain] = model(x)
    return found


@pytest.fixture(autouse=True)
def _one_backend() -> None:
    with bk.use_backend("aten"):
        yield


def check(model: nn.Module, x: torch.Tensor) -> bk.PruneReport:
    before = results(model, x)
    state = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    report = bk.prune_unused_(model, x)
    for domain, y in results(model, x).items():
        assert_equal(y, before[domain])
        assert_equal(bk.plan(model, x, domain)(x), before[domain])
    assert report.parameters[1] == sum(p.numel() for p in model.parameters())
    assert list(model.state_dict()) == list(state)
    # A second time there is nothing left.
    again = bk.prune_unused_(model, x)
    assert again.parameters == (report.parameters[1],) * 2
    return report


@pytest.mark.parametrize("both", [False, True], ids=["in", "both"])
@pytest.mark.parametrize("network", SMALL)
@torch.no_grad()
def test_small_networks(network: str, both: bool) -> None:
    report = check(with_lists(randomise(SMALL[network]()), 0, both), torch.randn(2, 3, 16, 16))
    # What cannot be recorded is one operation, around which everything stays.
    if network == "data_dependent":
        assert report.parameters[1] == report.parameters[0]
    else:
        assert report.parameters[1] < report.parameters[0]
        assert report.macs[1] < report.macs[0]


@torch.no_grad()
def test_random_networks() -> None:
    for seed in range(40):
        model = with_lists(randomise(random_network(seed), seed), seed, seed % 2 == 1)
        try:
            check(model, torch.randn(2, 3, 7, 9, generator=torch.Generator().manual_seed(seed)))
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {model}") from error


@pytest.mark.parametrize("network", LARGE)
@torch.no_grad()
def test_known_networks(network: str) -> None:
    report = check(with_lists(randomise(LARGE[network]()), 1), torch.randn(1, 3, 64, 64))
    assert report.parameters[1] < 0.97 * report.parameters[0]


@torch.no_grad()
def test_dropped_channels() -> None:
    model = with_lists(randomise(Dense()), 0)
    lists = {
        "a": {"convs.1": bk.ChannelLists([0, 7]), "last.2": bk.ChannelLists([0, 9])},
        "b": {"convs.1": bk.ChannelLists([1]), "last.2": bk.ChannelLists([9, 17]), "head": bk.ChannelLists([3])},
    }
    for layer in ("convs.0", "convs.2"):
        lists["a"][layer] = lists["b"][layer] = bk.ChannelLists([1, 2])
    lists["a"]["head"] = bk.ChannelLists([3, 4])
    bk.attach_(model, lists)
    before = results(model, x := torch.randn(2, 3, 16, 16))
    report = bk.prune_unused_(model, x)
    # Nothing reads what convs.1 writes, so what it reads does not count; as no layer may be empty, it keeps one filter.
    # Left are 0, 1, 2 of the stem, the last filter of convs.0 (9), and the last of convs.2 (17).
    assert model.stem.weight.shape == (3, 3, 3, 3)
    assert [tuple(conv.weight.shape[:2]) for conv in model.convs] == [(1, 3), (1, 4), (1, 5)]
    assert [norm.num_features for norm in model.norms] == [3, 4, 5]
    assert model.last[2].weight.shape[:2] == (2, 6)
    assert model.convs[1].lists["a"] == bk.ChannelLists([0])
    assert report.table["b"]["last.2"] == bk.ChannelLists([3, 5])
    assert "convs.1: 10 -> 4 became 4 -> 1 channels" in str(report)
    for domain, y in results(model, x).items():
        assert_equal(y, before[domain])


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:prune_unused_")
def test_slices_without_channels() -> None:
    class Empty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.relu(self.first(x))
            return self.last(torch.cat([y[:, :0], y], 1))

    model = with_lists(Empty().eval(), 0)
    x = torch.randn(2, 3, 5, 5)
    before = results(model, x)
    bk.prune_unused_(model, x)
    for domain, y in results(model, x).items():
        assert_equal(y, before[domain])


@torch.no_grad()
def test_the_table_fits_a_copy() -> None:
    model = with_lists(randomise(Residual()), 0)
    x = torch.randn(1, 3, 16, 16)
    report = bk.prune_unused_(model)
    other = copy.deepcopy(model)
    bk.attach_(other, report.table)
    for domain, y in results(other, x).items():
        assert torch.equal(y, results(model, x)[domain])


def test_training_goes_on() -> None:
    model = with_lists(randomise(Residual()), 0)
    model.stem[0].weight.requires_grad_(False)
    bk.prune_unused_(model)
    model.train()(torch.randn(2, 3, 16, 16)).sum().backward()
    assert model.c.weight.grad.shape == model.c.weight.shape
    assert not model.stem[0].weight.requires_grad


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"prune_unused_\(\): expected `model` to have swapped layers, got none"):
        bk.prune_unused_(Residual().eval())
    model = bk.swap_(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)).eval())
    bk.attach_(model, {"a": {"1": bk.ChannelLists(None, [0, 1])}})
    with pytest.raises(NotImplementedError, match=r"prune_unused_\(\): expected out-lists only in MaskedConv2d, got l"):
        bk.prune_unused_(model)
    model = bk.swap_(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)).eval())
    model[1].weight = model[0].weight
    with pytest.raises(NotImplementedError, match=r"prune_unused_\(\): expected each parameter in one layer, got one"):
        bk.prune_unused_(model)
