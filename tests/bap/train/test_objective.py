"""What a step adds to the cross entropy: values and gradients by formulas, few kernels, no wait for the device."""

from __future__ import annotations

import math

import pytest
import torch
from bap.config import Config
from bap.data import Arrays, Domain
from bap.train.evaluate import Accuracy
from bap.train.sharing import LOSSES, sharing_loss, sharing_loss_of_one
from bap.train.trainer import Trainer
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import bap_kernels as bk


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("count", [2, 5, 10])
@pytest.mark.parametrize("binary", [True, False])
def test_the_loss_of_one_domain_is_the_whole_loss_in_it(kind: str, count: int, binary: bool) -> None:
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        switches = torch.rand(count, 30, generator=generator, dtype=torch.float64)
        if binary:
            switches = (switches < 0.8).double()
        costs = torch.rand(30, generator=generator, dtype=torch.float64) + 0.1
        for own in range(count):
            whole = switches.clone().requires_grad_()
            expected = sharing_loss(kind, whole, costs, 0.4)
            expected.backward()
            one = switches[own].clone().requires_grad_()
            others = torch.cat([switches[:own], switches[own + 1 :]])
            found = sharing_loss_of_one(kind, one, others, costs / costs.sum(), 0.4)
            found.backward()
            torch.testing.assert_close(found, expected)
            torch.testing.assert_close(one.grad, whole.grad[own])


def test_nothing_kept_is_no_jaccard_loss() -> None:
    own = torch.zeros(4, requires_grad=True)
    loss = sharing_loss_of_one("jaccard", own, torch.zeros(2, 4), torch.full((4,), 0.25), 0.5)
    loss.backward()
    assert loss.item() == 0
    assert own.grad is not None
    assert own.grad.isfinite().all()


def _domains(count: int) -> dict[str, Domain]:
    pixels = torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    split = Arrays(pixels, torch.tensor([0, 1] * 4))
    return {f"d{n}": Domain(f"d{n}", ("x", "y"), {"train": split, "val": split}, 8) for n in range(count)}


def _trainer(count: int, blocks: int = 1, **changes: object) -> Trainer:
    options = {"widths": [4, 4, 4], "blocks": [blocks] * 3}
    settings = {"epochs": 4, "batch": 4, "threads": 1, "backend": "aten", "sharing": "union", "relaxed": True}
    return Trainer(Config(model_options=options, **{**settings, **changes}), _domains(count)).open()


@pytest.mark.parametrize("relaxed", [True, False])
def test_penalties_and_multipliers_follow_their_formulas(relaxed: bool) -> None:
    """λ, rows of the others and λ_PS over several steps, beside the same in Python's floats."""
    trainer = _trainer(3, relaxed=relaxed, sharing_weight=0.75, sharing_learnable=True, sharing_rate=0.5, beta=0.4)
    bank, objective, names = trainer.bank, trainer.objective, list(trainer.domains)
    generator = torch.Generator().manual_seed(0)
    for name in names:
        bank.write(name, 5e-3 + 4e-3 * torch.randn(sum(bank.sizes), generator=generator))
    shares = (trainer.costs / trainer.costs.sum()).tolist()
    lambdas, weight = dict.fromkeys(names, 0.0), 0.75
    objective.begin()
    for number, name in enumerate([*names, "d1", "d1", "d2", "d0"]):
        scores = {one: bank.scores(one).detach().double().tolist() for one in names}
        hard = {one: [1.0 if score > 5e-3 else 0.0 for score in scores[one]] for one in names}
        rows = hard
        if relaxed:
            rows = {one: [1 / (1 + math.exp(-(score - 5e-3) / 2e-3)) for score in scores[one]] for one in names}
        used = sum(share * on for share, on in zip(shares, hard[name], strict=True))
        union = sum(
            share * (1 - math.prod(1 - rows[one][index] for one in names)) for index, share in enumerate(shares)
        )
        sharing = max(0.0, union / 0.4 - 1)
        expected = max(0.0, lambdas[name] * (used - 0.4)) + weight * sharing
        found = objective.penalty(name)
        assert float(found.detach()) == pytest.approx(expected, rel=1e-5, abs=1e-7)
        lambdas[name] = max(0.0, lambdas[name] + 0.1 * (used - 0.4))
        weight = max(0.0, weight + 0.5 * sharing)
        # A step changes the domain's scores; the rows of the others follow.
        moved = bank.scores(name).detach() + 2e-3 * torch.randn(sum(bank.sizes), generator=generator)
        bank.write(name, moved)
        objective.changed(name)
        assert trainer.multipliers[name].value == 0, number
    objective.end()
    assert {name: one.value for name, one in trainer.multipliers.items()} == pytest.approx(lambdas, rel=1e-5)
    assert trainer.sharing_weight.value == pytest.approx(weight, rel=1e-5)


def _profiled(trainer: Trainer) -> tuple[int, int]:
    """Computing kernels of a step, and values that it reads back from the device, beside the optimisers'."""
    x, y = next(trainer.domains["d0"].batches("train", 4, (0,)))
    trainer.ddp_model.train()
    with bk.use_backend("aten"):
        for name in ("d0", "d1", "d0"):
            trainer._step(name, x, y, Accuracy())
        with profile(activities=[ProfilerActivity.CPU]) as found:
            trainer._step("d0", x, y, Accuracy())
    ours = [event for event in found.events() if event.name.startswith("aten::")]
    kernels = [event for event in ours if not any(child.name.startswith("aten::") for child in event.cpu_children)]
    reads = 0
    for event in ours:
        if event.name == "aten::_local_scalar_dense":
            parent = event.cpu_parent
            while parent is not None and "_fused_" not in parent.name:
                parent = parent.cpu_parent
            reads += parent is None
    return len(kernels), reads


def test_a_step_has_as_many_kernels_for_ten_domains_as_for_two_and_never_waits() -> None:
    counts = {count: _profiled(_trainer(count)) for count in (2, 10)}
    assert counts[2] == counts[10]
    assert counts[2][1] == 0
    # The losses on switches take few of them: next to none for a layer.
    for blocks in (1, 3):
        without = _trainer(10, blocks, sharing=None)
        without.multipliers.clear()
        whole, bare = _profiled(_trainer(10, blocks))[0], _profiled(without)[0]
        assert whole - bare < 80 + 10 * blocks, (whole, bare)


def _steps(trainer: Trainer, count: int) -> dict[str, Tensor]:
    trainer.ddp_model.train()
    x, y = next(trainer.domains["d0"].batches("train", 4, (0,)))
    with bk.use_backend("aten"):
        for number in range(count):
            trainer._step(f"d{number % 2}", x, y, Accuracy())
    return trainer.model.state_dict()


def test_fused_optimisers_step_like_plain_ones() -> None:
    states = []
    for fused in (True, False):
        trainer = _trainer(2, train_backbone=True, lr_switch=1e-4, weight_decay=1e-3)
        for optimizer in trainer.optimizers.values():
            for group in optimizer.param_groups:
                assert group["fused"] is True
                group["fused"], group["foreach"] = fused, False
        states.append(_steps(trainer, 6))
    for name, value in states[1].items():
        torch.testing.assert_close(states[0][name], value, rtol=1e-4, atol=1e-6, msg=name)
