"""Costs of switches, the share, the multiplier and the projection."""

from __future__ import annotations

import pytest
import torch
from bap.prune.layers import ConvSpec, SwitchBank, conv_specs
from bap.train.budget import MEASURES, Multiplier, project, share, switch_costs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import bap_kernels as bk

SPEC = {"a": ConvSpec(2, 4, 9, 1, 16), "b": ConvSpec(4, 8, 6, 1, 4), "c": ConvSpec(8, 8, 9, 8, 4)}


@pytest.mark.parametrize(
    ("measure", "a", "b", "c"),
    [
        ("switch", 1, 1, 1),
        ("layer", 1 / 6, 1 / 12, 1 / 24),
        ("param", 36, 48, 9),
        ("mac", 576, 192, 36),
        ("time", 0.5, 0.25, 0.125),
    ],
)
def test_switch_costs_of_every_measure(measure: str, a: float, b: float, c: float) -> None:
    costs = switch_costs(measure, SPEC, {"a": 0.5, "b": 0.25, "c": 0.125})
    assert costs.dtype == torch.float64
    torch.testing.assert_close(costs, torch.tensor([a] * 2 + [b] * 4 + [c] * 8, dtype=torch.float64))


def test_layer_measure_is_the_mean_of_layer_means() -> None:
    on = torch.tensor([1, 0, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 1, 0.0])
    assert share(on, switch_costs("layer", SPEC)).item() == pytest.approx((1 / 2 + 2 / 4 + 7 / 8) / 3)


def test_conv_specs_of_a_network() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, (3, 2), stride=(2, 1), padding=(1, 0)), nn.Conv2d(8, 8, 3, groups=8))
    specs = conv_specs(model.train(), torch.zeros(2, 3, 9, 7))
    assert specs == {"0": ConvSpec(3, 8, 6, 1, 5 * 6), "1": ConvSpec(8, 8, 9, 8, 3 * 4)}
    assert specs["0"].macs == 3 * 8 * 6 * 30
    assert specs["1"].params == 72
    assert model.training


def test_the_share_has_the_gradient_of_its_formula() -> None:
    switches = torch.rand(2, 5, requires_grad=True)
    costs = torch.tensor([1.0, 2.0, 3.0, 4.0, 10.0], dtype=torch.float64)
    share(switches, costs).sum().backward()
    torch.testing.assert_close(switches.grad, (costs / 20).float().expand(2, 5))


def test_multiplier_follows_kkt() -> None:
    multiplier = Multiplier(beta=0.5, rate=0.1)
    used = torch.tensor(0.8, requires_grad=True)
    assert multiplier.loss(used).item() == 0
    for _ in range(10):
        multiplier.update(0.8)
    assert multiplier.value == pytest.approx(0.3)
    multiplier.loss(used).backward()
    assert used.grad.item() == pytest.approx(0.3)
    # With slack there is no loss, and λ falls to exactly zero.
    assert multiplier.loss(torch.tensor(0.4)).item() == 0
    for _ in range(40):
        multiplier.update(0.4)
    assert multiplier.value == 0


def test_projection_turns_off_the_weakest() -> None:
    scores = torch.tensor([0.9, 0.2, 0.3, 0.1, 0.05, 0.01])
    costs = torch.ones(6, dtype=torch.float64)
    made = project(scores, 0.04, costs, 0.5)
    assert (made.scores > 0.04).tolist() == [True, True, True, False, False, False]
    assert (made.turned_off, made.before, made.after) == (2, 5 / 6, 0.5)
    assert torch.equal(made.scores[:3], scores[:3])
    again = project(made.scores, 0.04, costs, 0.5)
    assert (again.turned_off, again.before) == (0, 0.5)
    assert torch.equal(again.scores, made.scores)


def test_projection_restores_cheap_switches() -> None:
    # The cheap weak one went first; the dear one alone was enough.
    made = project(torch.tensor([0.1, 0.2, 0.9]), 0.0, torch.tensor([1.0, 10.0, 9.0], dtype=torch.float64), 0.5)
    assert (made.scores > 0).tolist() == [True, False, True]
    assert made.turned_off == 1


def test_projection_gives_room_back_strongest_first() -> None:
    # Far below the budget of 9.6: the strongest that is off goes first, the dear one does not fit, a cheaper one does.
    scores = torch.tensor([0.9, 0.3, 0.2, -0.1, 0.1])
    costs = torch.tensor([1.0, 3.0, 20.0, 2.0, 6.0], dtype=torch.float64)
    assert project(scores, 0.5, costs, 0.3).scores.tolist() == scores.tolist()
    made = project(scores, 0.5, costs, 0.3, give_back=True)
    assert (made.scores > 0.5).tolist() == [True, True, False, True, False]
    assert (made.turned_off, made.turned_on, made.before, made.after) == (0, 2, 1 / 32, 6 / 32)
    # 10 of 32 would be 0.3125.
    assert torch.equal(made.scores[[0, 2, 4]], scores[[0, 2, 4]])
    again = project(made.scores, 0.5, costs, 0.3, give_back=True)
    assert (again.turned_off, again.turned_on) == (0, 0)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.floats(0.01, 1), st.integers(0, 10_000))
def test_given_back_room_leaves_the_budget_exact(count: int, beta: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(count, generator=generator) - 1.0 * (seed % 3)
    costs = torch.rand(count, generator=generator, dtype=torch.float64)
    made = project(scores, 0.0, costs, beta, give_back=True)
    on = made.scores > 0
    assert float(costs[on].sum()) <= beta * float(costs.sum())
    assert made.turned_on == int((on & (scores <= 0)).sum())
    assert made.turned_off == int((~on & (scores > 0)).sum())
    assert made.after == pytest.approx(float(costs[on].sum()) / float(costs.sum()))
    # No channel that is off fits any more.
    for index in (~on).nonzero().flatten().tolist():
        more = on.clone()
        more[index] = True
        assert float(costs[more].sum()) > beta * float(costs.sum())


def test_projection_keeps_some_of_every_layer() -> None:
    scores = torch.tensor([0.1, 0.2, 0.8, 0.9])
    costs = torch.ones(4, dtype=torch.float64)
    assert (project(scores, 0.0, costs, 0.5).scores > 0).tolist() == [False, False, True, True]
    kept = project(scores, 0.0, costs, 0.5, sizes=[2, 2], keep_at_least=1)
    assert (kept.scores > 0).tolist() == [False, True, False, True]
    with pytest.raises(ValueError, match=r"to leave room for 1 channels of every layer, which take 0.5000, got 0.25"):
        project(scores, 0.0, costs, 0.25, sizes=[2, 2], keep_at_least=1)
    with pytest.raises(ValueError, match="expected `sizes`"):
        project(scores, 0.0, costs, 0.5, keep_at_least=1)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.floats(0.01, 1), st.integers(0, 10_000))
def test_projection_is_exact_and_maximal(count: int, beta: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(count, generator=generator)
    costs = torch.rand(count, generator=generator, dtype=torch.float64)
    made = project(scores, 0.0, costs, beta)
    on = made.scores > 0
    assert float(costs[on].sum()) <= beta * float(costs.sum())
    assert made.turned_off == int((scores > 0).sum()) - int(on.sum())
    assert not (on & (scores <= 0)).any()
    for index in ((scores > 0) & ~on).nonzero().flatten().tolist():
        more = on.clone()
        more[index] = True
        assert float(costs[more].sum()) > beta * float(costs.sum())


def test_bank_reads_and_writes_the_layers() -> None:
    model = bk.nn.switch_(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)), ["a", "b"])
    bank = SwitchBank(model)
    bank.write("b", torch.tensor([0.0, 1, 1, 1, 0, 0, 1]))
    assert bank.masks().tolist() == [[True] * 7, [False, True, True, True, False, False, True]]
    assert model[1].channels("b").in_index.tolist() == [0, 3]
    switches = bank.switches("b")
    assert switches.tolist() == [0, 1, 1, 1, 0, 0, 1]
    (switches * torch.arange(7.0)).sum().backward()
    assert model[1].domains["b"].score.grad.tolist() == [3, 4, 5, 6]
    assert model[1].domains["a"].score.grad is None
    assert [part.tolist() for part in bank.by_layer(bank.mask("b")).values()] == [[0, 1, 1], [1, 0, 0, 1]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: switch_costs("flop", SPEC), r"one of \['switch', 'layer', 'param', 'mac', 'time'\], got 'flop'"),
        (lambda: switch_costs("mac", {}), "at least one layer, got none"),
        (lambda: switch_costs("time", SPEC, {"a": 1.0}), r"got none of \['b', 'c'\]"),
        (lambda: Multiplier(0.0), r"`beta` to be in \(0, 1\], got 0.0"),
        (lambda: Multiplier(0.5, rate=0), "`rate` to be positive, got 0"),
        (lambda: Multiplier(0.5, value=-1), "`value` to be at least 0, got -1"),
        (lambda: project(torch.ones(1), 0.0, torch.ones(1), 1.5), r"`beta` to be in \(0, 1\], got 1.5"),
        (lambda: SwitchBank(nn.Conv2d(3, 3, 3)), "to have switches, got none"),
        (lambda: conv_specs(nn.Linear(3, 3), torch.zeros(1, 3)), "to have convolutions"),
    ],
)
def test_errors(call, message: str) -> None:
    assert MEASURES[3] == "mac"
    with pytest.raises(ValueError, match=message):
        call()
