"""Another order of the channels leaves every domain's result as it was, and makes lists whole blocks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bap_kernels as bk
from bap_kernels.nn import MaskedConv2d
from bap_kernels.plan.cover import candidate_orders, covered, runs
from tests.networks import LARGE, SMALL, Residual, random_network, randomise
from tests.plan.test_domain_view import DOMAINS, trained

pytestmark = pytest.mark.usefixtures("aten")

NAMES = ("a", "b", "c")


def related(model: nn.Module, seed: int, density: float = 0.5, own: float = 0.1) -> bk.ChannelTable:
    """In-lists of three domains that agree on all but some channels."""
    rng = np.random.default_rng(seed)
    table: dict[str, dict[str, bk.ChannelLists]] = {name: {} for name in NAMES}
    for layer, conv in model.named_modules():
        if isinstance(conv, bk.nn.GatheredConv2d) and conv.groups == 1 and conv.in_channels > 4:
            shared = rng.random(conv.in_channels) < density
            for name in NAMES:
                mask = np.where(rng.random(conv.in_channels) < own, ~shared, shared)
                mask[int(rng.integers(conv.in_channels))] = True
                table[name][layer] = bk.ChannelLists.from_mask(mask)
    return bk.ChannelTable(table)


def results(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    found = {}
    for domain in NAMES:
        bk.set_domain(model, domain)
        found[domain] = model(x)
    return found


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for domain, y in expected.items():
        assert got[domain].shape == y.shape
        assert (got[domain] - y).abs().max() <= 1e-9 * y.abs().max()


def check(model: nn.Module, x: Tensor) -> bk.OrderReport:
    """Orders a network in float64 and compares all results; no list gets worse on the whole."""
    before = results(model, x)
    parameters = list(model.parameters())
    report = bk.order_channels_(model, x)
    assert_same(results(model, x), before)
    assert all(new is old for new, old in zip(model.parameters(), parameters, strict=True))
    for size in (8, 16):
        old, new = report.efficiency(size)
        assert 0 < old <= new <= 1
    for name in NAMES:
        for layer, lists in report.table[name].items():
            assert model.get_submodule(layer).lists[name] == lists
    return report


@pytest.mark.parametrize("both", [False, True], ids=["in", "both"])
@pytest.mark.parametrize("network", SMALL)
@torch.no_grad()
def test_small_networks(network: str, both: bool) -> None:
    model = bk.swap_(randomise(SMALL[network]()).double(), layer_type=MaskedConv2d)
    bk.attach_(model, bk.ChannelTable.random(model, NAMES, 0.4, 0, both))
    report = check(model, torch.randn(2, 3, 16, 16, dtype=torch.float64))
    # What cannot be recorded is one operation, around which everything stays.
    assert (report.moved > 0) == (network != "data_dependent")


@torch.no_grad()
def test_random_networks() -> None:
    moved = 0
    for seed in range(60):
        model = bk.swap_(randomise(random_network(seed), seed).double(), layer_type=MaskedConv2d)
        bk.attach_(model, bk.ChannelTable.random(model, NAMES, 0.5, seed, seed % 2 == 1))
        x = torch.randn(2, 3, 7, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        try:
            moved += check(model, x).moved > 0
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {model}") from error
    assert moved > 30


@pytest.mark.parametrize("network", LARGE)
@torch.no_grad()
def test_known_networks(network: str) -> None:
    model = bk.swap_(randomise(LARGE[network]()).double())
    bk.attach_(model, related(model, 0))
    report = check(model, torch.randn(1, 3, 64, 64, dtype=torch.float64))
    for size in (8, 16):
        before, after = report.efficiency(size)
        assert after > 1.2 * before
    assert report.mean_run()[1] > 1.5 * report.mean_run()[0]
    # Neither images nor logits move; classifiers follow what they read.
    stem = next(iter(report.table["a"]))
    assert model.get_submodule(stem).in_channels == 3


@torch.no_grad()
def test_plan_specialize_and_prune_after_it() -> None:
    x = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    model = bk.swap_(randomise(LARGE["resnet18"]()).double())
    bk.attach_(model, related(model, 1, density=0.3, own=0.02))
    before = results(model, x)
    bk.order_channels_(model, x)
    planned = bk.plan(model, x, "a")
    for domain, y in before.items():
        bk.set_domain(planned, domain)
        assert_same({domain: planned(x)}, {domain: y})
        assert_same({domain: bk.specialize(model, domain, x)(x)}, {domain: y})
    pruned = bk.prune_unused_(model, x)
    assert pruned.parameters[1] < pruned.parameters[0]
    assert_same(results(model, x), before)
    # What pruning leaves can be ordered again.
    check(model, x)


@torch.no_grad()
def test_save_and_load(tmp_path: Path) -> None:
    x = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    model = bk.swap_(randomise(Residual()).double())
    bk.attach_(model, related(model, 2))
    before = results(model, x)
    bk.order_channels_(model, x).table.save(tmp_path / "table")
    torch.save(model.state_dict(), tmp_path / "state")
    other = bk.swap_(Residual().double().eval())
    other.load_state_dict(torch.load(tmp_path / "state"))
    bk.attach_(other, bk.ChannelTable.load(tmp_path / "table"))
    assert_same(results(other, x), before)


@torch.no_grad()
def test_domain_batch_norm_and_classifiers() -> None:
    model, x = bk.swap_(trained().double()), torch.randn(2, 3, 48, 48, dtype=torch.float64)
    expected = {}
    for domain in DOMAINS:
        bk.set_domain(model, domain)
        expected[domain] = model(x)
    report = bk.order_channels_(model, x)
    assert report.moved > 0
    for domain, y in expected.items():
        bk.set_domain(model, domain)
        assert_same({domain: model(x)}, {domain: y})


class Headed(nn.Module):
    """Two convolutions, and a way from the second to classifiers."""

    def __init__(self, way: Callable[[nn.Module, Tensor], Tensor], pixels: int) -> None:
        super().__init__()
        self.way = way
        self.stem, self.conv, self.odd = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 24, 3), nn.Conv2d(24, 4, 1)
        self.flat = nn.Flatten()
        self.first, self.second = nn.Linear(24 * pixels, 5), nn.Linear(24 * pixels, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(F.relu(self.stem(x))))
        return self.way(self, x) + self.odd(x).sum((1, 2, 3))[:, None]


# Whether the channels before the classifier can move, how many pixels it reads, and the way to it.
WAYS: dict[str, tuple[bool, int, Callable[[nn.Module, Tensor], Tensor]]] = {
    "flatten": (True, 16, lambda m, x: m.first(torch.flatten(x, 1))),
    "method": (True, 16, lambda m, x: m.first(F.dropout(x.flatten(1), training=False))),
    "layer": (True, 16, lambda m, x: m.first(m.flat(x))),
    "view": (True, 16, lambda m, x: m.first(x.view(x.size(0), -1))),
    "shape": (True, 16, lambda m, x: m.first(x.reshape(x.shape[0], -1))),
    "mean": (True, 1, lambda m, x: m.first(x.mean((2, 3)))),
    "negative": (True, 1, lambda m, x: m.first(torch.mean(x, dim=(-1, -2)))),
    "squeeze": (True, 1, lambda m, x: m.first(F.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(-1))),
    "squeezed": (True, 1, lambda m, x: m.first(F.adaptive_avg_pool2d(x, 1).squeeze())),
    "two": (True, 1, lambda m, x: m.first(y := x.mean((2, 3))) - m.second(y)),
    "both": (True, 16, lambda m, x: m.first(torch.flatten(x, 1)) - m.second(x.flatten(1))),
    "twice": (False, 1, lambda m, x: m.first(x.mean((2, 3))) - m.first(x.amax((2, 3)))),
    "softmax": (False, 1, lambda m, x: m.first(torch.cumsum(x.mean((2, 3)), 1))),
    "columns": (False, 1, lambda m, x: m.first(F.pad(x, (0, 20, 0, 0)).mean((1, 2)))),
    "transposed": (False, 16, lambda m, x: m.first(x.transpose(1, 2).flatten(1))),
    "named": (False, 1, lambda m, x: m.first(x.mean((2, 3))) + m.first.weight.sum(0)[:5]),
}


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_columns_of_classifiers(way: str) -> None:
    moves, pixels, forward = WAYS[way]
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    model = bk.swap_(randomise(Headed(forward, pixels)).double())
    bk.attach_(model, related(model, 0))
    before = model.conv.weight.clone()
    check(model, x)
    reads_in_place = torch.equal(model.conv.weight.sum(1), before.sum(1))
    # squeeze twice passes through a value of three axes, which has no rule.
    assert reads_in_place == (not moves or way == "squeeze")


@torch.no_grad()
def test_hooks_keep_channels_in_place() -> None:
    model = bk.swap_(randomise(Headed(WAYS["mean"][2], 1)).double())
    bk.attach_(model, related(model, 0))
    before = model.conv.weight.clone()
    # It reads channels by number.
    model.first.register_forward_pre_hook(lambda _, args: (args[0] * torch.arange(24.0),))
    check(model, torch.randn(1, 3, 8, 8, dtype=torch.float64))
    torch.testing.assert_close(model.conv.weight.sum(1), before.sum(1))


@torch.no_grad()
def test_layers_that_steps_without_a_rule_have_too() -> None:
    class Inner(nn.Module):
        def __init__(self, conv: nn.Conv2d) -> None:
            super().__init__()
            self.conv = conv

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) if x.sum() > -1e9 else x

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv, self.tail = nn.Conv2d(3, 32, 1), nn.Conv2d(32, 32, 1), nn.Conv2d(32, 4, 1)
            self.inner = Inner(self.conv)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(F.relu(self.stem(x)))
            return self.tail(self.inner(torch.cumsum(x, 1)))

    model = bk.swap_(randomise(Outer()).double())
    bk.attach_(model, related(model, 0, density=0.2))
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    assert check(model, x).moved == 0
    before = results(model, x)
    bk.prune_unused_(model, x)
    assert_same(results(model, x), before)


@torch.no_grad()
def test_unrelated_lists_are_never_covered_worse() -> None:
    for density in (0.1, 0.5, 0.9):
        model = bk.swap_(LARGE["resnet26"]().double().eval())
        bk.attach_(model, bk.ChannelTable.random(model, 8, density))
        report = bk.order_channels_(model, block=32)
        for size in (8, 16, 32):
            before, after = report.efficiency(size)
            assert after >= before
            listed = sum(one.listed * one.macs for one in report.lists)
            assert after == pytest.approx(listed / sum(one.covered[size][1] * one.macs for one in report.lists))


@torch.no_grad()
def test_figures_of_one_list() -> None:
    model = bk.swap_(nn.Sequential(nn.Conv2d(3, 40, 1), nn.Conv2d(40, 6, 1)).eval())
    bk.attach_(model, {"a": {"1": bk.ChannelLists(list(range(1, 40, 4)))}, "b": {}})
    report = bk.order_channels_(model, torch.randn(2, 3, 5, 5))
    (one,) = report.lists
    assert (one.layer, one.domain, one.side, one.listed, one.channels) == ("1", "a", "in", 10, 40)
    assert one.macs == 2 * 5 * 5 * 6
    assert one.runs == (10, 1)
    assert one.covered == {8: (40, 16), 16: (40, 16)}
    assert report.efficiency(8) == (10 / 40, 10 / 16)
    assert report.mean_run() == (1.0, 10.0)
    assert "1: blocks of 8 25.0% -> 62.5%" in str(report)
    again = bk.order_channels_(model, torch.randn(2, 3, 5, 5))
    assert again.moved == 0
    assert again.efficiency(8) == (10 / 16, 10 / 16)


def test_candidates_are_orders() -> None:
    rng = np.random.default_rng(0)
    for n, m, offset in ((2, 1, 0), (7, 3, 5), (40, 6, 3), (33, 2, 0), (16, 4, 8)):
        rows = rng.random((n, m)) < 0.5
        for order in candidate_orders(rows, rng.random(m), [8, 16], offset):
            assert sorted(order.tolist()) == list(range(n))


def test_cover_and_runs() -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        mask = rng.random(int(rng.integers(1, 70))) < rng.random()
        for size in (1, 8, 16):
            blocks = [mask[i : i + size] for i in range(0, len(mask), size)]
            assert covered(mask, size) == sum(len(block) for block in blocks if block.any())
        edges = np.diff(np.concatenate([[0], mask.astype(int), [0]]))
        assert runs(mask) == (edges == 1).sum()
    assert covered(np.zeros(0, dtype=bool), 8) == runs(np.zeros(0, dtype=bool)) == 0


def test_inference_tensors() -> None:
    with torch.inference_mode():
        model = bk.swap_(randomise(Residual()).double())
        bk.attach_(model, related(model, 0))
        x = torch.randn(1, 3, 16, 16, dtype=torch.float64)
        before = results(model, x)
    report = bk.order_channels_(model)
    assert report.moved > 0
    with torch.inference_mode():
        assert_same(results(model, x), before)


def test_errors() -> None:
    model = bk.swap_(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)).eval())
    bk.attach_(model, {"a": {"1": bk.ChannelLists([1, 5])}})
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"order_channels_\(\): expected `model` to have swapped layers, got none"):
        bk.order_channels_(Residual().eval())
    with pytest.raises(TypeError, match=r"order_channels_\(\): expected `block` to be an int, got float"):
        bk.order_channels_(model, block=8.0)
    with pytest.raises(ValueError, match=r"order_channels_\(\): expected `block` to be positive, got 0"):
        bk.order_channels_(model, block=0)
    with pytest.raises(ValueError, match=r"order_channels_\(\): expected `example_input` to be what `model` takes"):
        bk.order_channels_(model, torch.randn(1, 5, 8, 8))
    with pytest.raises(ValueError, match=r"order_channels_\(\): expected `model` to be in eval mode"):
        bk.order_channels_(model.train())
    bk.set_domain(model.eval(), torch.tensor([0, 0]))
    for change in (bk.order_channels_, bk.prune_unused_):
        with pytest.raises(ValueError, match=r"expected `model` to be set to one domain, got a mixed batch"):
            change(model)
    bk.set_domain(model, "a")
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
    bk.attach_(model, {"a": {"1": bk.ChannelLists(None, [0, 1])}})
    with pytest.raises(NotImplementedError, match=r"order_channels_\(\): expected out-lists only in MaskedConv2d, got"):
        bk.order_channels_(model)
    switched = trained()
    switched.conv1 = bk.nn.GatheredConv2d.from_conv2d(switched.conv1)
    with pytest.raises(NotImplementedError, match=r"order_channels_\(\): expected layers with fixed lists, got the sw"):
        bk.order_channels_(switched)


@torch.no_grad()
def test_packed_weights_follow(backend: str) -> None:
    with bk.use_backend(backend):
        x = torch.randn(2, 3, 16, 16)
        model = bk.swap_(randomise(Residual()))
        bk.attach_(model, related(model, 0))
        expected = results(model, x)
        assert bk.order_channels_(model, x).moved > 0
        for domain, y in results(model, x).items():
            torch.testing.assert_close(y, expected[domain], rtol=1e-4, atol=1e-4 * expected[domain].abs().max().item())
        for domain, y in expected.items():
            torch.testing.assert_close(
                bk.plan(model, x, domain)(x), y, rtol=1e-4, atol=1e-4 * expected[domain].abs().max().item()
            )
