"""Sharing losses against sets counted one by one, their gradients, and the weight."""

from __future__ import annotations

import pytest
import torch
from bap.train.sharing import LOSSES, SharingWeight, intersection, relax, sharing_loss, union

COSTS = torch.tensor([5.0, 1.0, 2.0, 4.0, 8.0])
SETS = [{0, 1, 2}, {0, 2, 3}, {0, 2}]


def _switches(sets: list[set[int]]) -> torch.Tensor:
    return torch.tensor([[float(m in one) for m in range(5)] for one in sets])


def _cost(kept: set[int]) -> float:
    return sum(COSTS[m].item() for m in kept)


def test_intersection_and_union_equal_set_sizes() -> None:
    switches = _switches(SETS)
    assert intersection(switches, COSTS).item() == _cost(set.intersection(*SETS)) == 7
    assert union(switches, COSTS).item() == _cost(set.union(*SETS)) == 12
    assert intersection(switches[:1], COSTS).item() == union(switches[:1], COSTS).item() == _cost(SETS[0])


@pytest.mark.parametrize(
    ("kind", "beta", "expected"),
    [
        ("int", 0.5, 1 - 7 / 10),
        ("int", 0.25, 0.0),
        ("union", 0.5, 12 / 10 - 1),
        ("union", 0.75, 0.0),
        ("jaccard", 0.5, 1 - 7 / 12),
        ("jaccard", 1.0, 1 - 7 / 12),
    ],
)
def test_values(kind: str, beta: float, expected: float) -> None:
    assert sharing_loss(kind, _switches(SETS), COSTS, beta).item() == pytest.approx(expected)


@pytest.mark.parametrize("kind", LOSSES)
def test_losses_of_equal_domains_within_the_budget_are_zero(kind: str) -> None:
    same = _switches([{0, 3}] * 3)
    assert sharing_loss(kind, same, COSTS, 9 / 20).item() == pytest.approx(0)


def test_straight_through_gradient_is_zero_where_others_disagree() -> None:
    switches = _switches(SETS).requires_grad_(True)
    sharing_loss("int", switches, COSTS, 0.5).backward()
    # ∂/∂s_dm = −a_m Π of the others / (βM): for the third domain, 0 and 2 are kept by both others.
    torch.testing.assert_close(switches.grad[2], -torch.tensor([5.0, 0, 2, 0, 0]) / 10)
    switches.grad = None
    sharing_loss("union", switches, COSTS, 0.5).backward()
    # a_m Π (1 − s of the others): only 4 is off in both others.
    torch.testing.assert_close(switches.grad[2], torch.tensor([0.0, 0, 0, 0, 8]) / 10)


@pytest.mark.parametrize("kind", LOSSES)
def test_relaxed_gradients_are_dense_and_right(kind: str) -> None:
    scores = (torch.randn(3, 5, dtype=torch.float64) * 2e-3 + 5e-3).requires_grad_(True)
    beta = 0.9 if kind == "int" else 0.1

    def loss(scores: torch.Tensor) -> torch.Tensor:
        return sharing_loss(kind, relax(scores, 5e-3), COSTS.double(), beta)

    loss(scores).backward()
    assert (scores.grad != 0).all()
    # Scores are about 1e-3, so the step of the numerical derivative must be smaller than gradcheck's default.
    assert torch.autograd.gradcheck(loss, (scores,), eps=1e-7, rtol=1e-3, atol=1e-4)


def test_relaxed_is_half_at_the_threshold_and_hard_far_from_it() -> None:
    assert relax(torch.tensor([5e-3, 1.0, -1.0]), 5e-3).tolist() == [0.5, 1.0, 0.0]


def test_jaccard_of_nothing_is_zero_with_a_gradient() -> None:
    switches = torch.zeros(2, 5, requires_grad=True)
    loss = sharing_loss("jaccard", switches, COSTS, 0.5)
    loss.backward()
    assert loss.item() == 0
    assert torch.isfinite(switches.grad).all()


def test_learnable_weight_is_a_dual_variable() -> None:
    weight = SharingWeight(0.5, learnable=True, rate=0.1, slack=0.2)
    assert weight.update(0.7) == pytest.approx(0.55)
    for _ in range(100):
        weight.update(0.0)
    assert weight.value == 0
    fixed = SharingWeight(0.25)
    assert fixed.update(0.9) == 0.25


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sharing_loss("iou", _switches(SETS), COSTS, 0.5), r"\['int', 'union', 'jaccard'\], got 'iou'"),
        (lambda: sharing_loss("int", _switches(SETS), COSTS, 0.0), r"in \(0, 1\], got 0.0"),
        (lambda: sharing_loss("int", _switches(SETS), COSTS[:2], 0.5), r"got \(3, 5\) and \(2,\)"),
        (lambda: relax(COSTS, 0.0, 0.0), "`temperature` to be positive, got 0.0"),
        (lambda: SharingWeight(-1), "at least 0, got -1"),
        (lambda: SharingWeight(1, rate=0), "positive, got 0"),
    ],
)
def test_errors(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
