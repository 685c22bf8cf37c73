"""Joint training: budgets, sharing losses, round robin and what a step moves."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from bap.config import Config
from bap.data import Domain, builtin_suite
from bap.prune.layers import SwitchBank
from bap.train import Trainer, backend_of
from bap.train.checkpoint import domain_spec, save_checkpoint
from bap.train.sharing import relax, sharing_loss
from bap.train.trainer import STATE
from torch import nn

import bap_kernels as bk
from bap_kernels import _C
from tests.bap.train.states import assert_states_equal, state_of


def test_the_constructor_has_no_side_effects(
    tiny: Config, suite: dict[str, Domain], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("torch.set_num_threads", lambda number: pytest.fail("threads were set"))
    monkeypatch.setattr("torch.manual_seed", lambda seed: pytest.fail("a seed was set"))
    part = tmp_path / f".{STATE}.123.part"
    part.touch()
    model = nn.Conv2d(3, 2, 1)
    generator = torch.get_rng_state()
    Trainer(tiny.replace(threads=3, weights="none.pth"), suite, tmp_path, resume=True, model=model)
    Trainer(tiny, suite, tmp_path / "new")
    assert torch.equal(torch.get_rng_state(), generator)
    assert not torch.distributed.is_initialized()
    assert list(tmp_path.iterdir()) == [part]
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("beta", [0.75, 0.3])
@pytest.mark.parametrize("measure", ["mac", "switch", "layer", "param"])
def test_budgets_hold_exactly(suite: dict[str, Domain], tiny: Config, beta: float, measure: str) -> None:
    config = tiny.replace(epochs=1, beta=beta, measure=measure)
    trainer = Trainer(config, suite).open()
    assert trainer.used("digits") == 1
    trainer.fit()
    for name in suite:
        assert 0.5 * beta < trainer.used(name) <= beta
        assert trainer.projected_off[name] >= 0
        assert not any(layer.domains[name].score.requires_grad for _, layer in trainer.bank.layers)
    record = trainer.log.records[-1]
    assert record["intersection"] <= beta <= 1
    assert record["union"] >= max(one["kept"] for one in record["domains"].values()) - 1e-9
    assert record["projected_off"] == sum(trainer.projected_off.values())


@pytest.mark.parametrize("kind", ["linear", "cubic"])
def test_an_annealed_budget_holds_exactly_after_every_epoch(suite: dict[str, Domain], tiny: Config, kind: str) -> None:
    config = tiny.replace(epochs=4, anneal=kind, anneal_start=0.9, anneal_until=0.75, beta=0.3, give_back=True)
    trainer = Trainer(config, suite).open()
    power = 1 if kind == "linear" else 3
    expected = [0.3 + 0.6 * (1 - done / 3) ** power for done in (1, 2)] + [0.3, 0.3]
    exact = []
    trainer.fit(after_epoch=lambda record: exact.append({name: trainer.used(name) for name in suite}))
    assert [record["beta"] for record in trainer.log.records] == pytest.approx(expected)
    for used, record in zip(exact, trainer.log.records, strict=True):
        for name in suite:
            assert 0.9 * record["beta"] < used[name] <= record["beta"]
            assert record["domains"][name]["kept"] == used[name]
    assert not any(layer.domains[name].score.requires_grad for _, layer in trainer.bank.layers)
    with pytest.raises(ValueError, match=r"`budget.anneal_until` to be at most `switches.freeze_at`, .* 0.75 > 0.5"):
        config.replace(settle=0.5)
    with pytest.raises(ValueError, match=r"`budget.anneal_start` to be at least `budget.beta`, got 0.9 < 0.95"):
        config.replace(beta=0.95)


def test_the_weight_of_the_sharing_loss_follows_its_schedule(suite: dict[str, Domain], tiny: Config) -> None:
    config = tiny.replace(sharing="union", relaxed=True, sharing_weight=2.0, sharing_schedule="fall")
    trainer = Trainer(config.replace(sharing_schedule_until=1.0), suite).open()
    trainer.fit()
    assert [record["sharing_weight"] for record in trainer.log.records] == [2.0, 1.5, 1.0, 0.5]
    trainer.objective.begin(0.5, 0.25)
    quarter = trainer.objective.penalty("digits").detach()
    trainer.multipliers["digits"].value = 0.0
    trainer.objective.begin(0.5, 0.25)
    quarter = trainer.objective.penalty("digits").detach()
    trainer.objective.begin(0.5, 1.0)
    torch.testing.assert_close(trainer.objective.penalty("digits").detach(), 4 * quarter)
    with pytest.raises(ValueError, match=r"`sharing.schedule` to be 'constant' for a learnable weight, got 'fall'"):
        config.replace(sharing_learnable=True)


def test_a_joint_step_has_the_gradients_of_its_domains(suite: dict[str, Domain], tiny: Config) -> None:
    from bap.train.evaluate import Accuracy

    config = tiny.replace(sharing="int", relaxed=True, train_backbone=True, round_robin="joint")
    batches = [(name, *next(domain.batches("train", 32, (0,)))) for name, domain in suite.items()]
    total: dict[str, torch.Tensor] = {}
    with bk.use_backend("aten"):
        for turn in batches:
            trainer = Trainer(config, suite).open()
            trainer.ddp_model.train()
            trainer._step(*turn, Accuracy())
            for name, parameter in trainer.model.named_parameters():
                if parameter.grad is not None:
                    total[name] = total.get(name, 0) + parameter.grad
        trainer = Trainer(config, suite).open()
        trainer.ddp_model.train()
        trainer._joint_step(batches, {name: Accuracy() for name in suite})
    found = {name: parameter.grad for name, parameter in trainer.model.named_parameters() if parameter.grad is not None}
    assert set(found) == set(total)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, total[name], rtol=1e-4, atol=1e-6, msg=name)
    with pytest.raises(ValueError, match=r"`schedule.round_robin` to be 'joint' for `schedule.steps`, got 'epoch'"):
        tiny.replace(steps=3)
    for wrong in ([], [0.5, 0.5], [0.75, 0.5]):
        with pytest.raises(ValueError, match=r"`schedule.milestones` to be ascending parts of the run, got \["):
            tiny.replace(milestones=wrong)


def test_batch_norm_can_go_with_sgd(suite: dict[str, Domain], tiny: Config) -> None:
    for norm, sizes in (("adam", (2, 1)), ("sgd", (1, 2))):
        trainer = Trainer(tiny.replace(norm=norm), suite).open()
        assert tuple(len(trainer.optimizers[name].param_groups) for name in ("adam", "sgd")) == sizes


def test_a_budget_without_room_is_refused_before_training(suite: dict[str, Domain], tiny: Config) -> None:
    with pytest.raises(ValueError, match=r"to leave room for 6 channels of every layer, which take 0\.\d+, got 0\.25"):
        Trainer(tiny.replace(beta=0.25, keep_at_least=6), suite).fit(after_epoch=lambda record: pytest.fail("trained"))


def test_a_domain_below_its_budget_gets_room_back(suite: dict[str, Domain], tiny: Config) -> None:
    found = {}
    for give_back in (False, True):
        config = tiny.replace(epochs=2, settle=0.5, beta=0.5, give_back=give_back, keep_at_least=1)
        trainer = Trainer(config, suite).open()
        few = torch.full((sum(trainer.bank.sizes),), -1.0)
        few[::9] = 1e-2
        trainer.bank.write("digits", few)
        trainer.fit()
        found[give_back] = trainer.used("digits")
        assert found[give_back] <= 0.5
        assert (trainer.given_back["digits"] > 0) == give_back
    assert found[False] < 0.2
    # All that is missing is less than the dearest channel.
    assert found[True] > 0.5 - float(trainer.costs.max() / trainer.costs.sum())


def test_straight_through_sharing_of_many_domains_is_warned_of(tiny: Config) -> None:
    many = builtin_suite(images=100)
    names = ["shapes", "digits", "glyphs", "textures"]
    config = tiny.replace(sharing="union", domains=names)
    with pytest.warns(
        UserWarning, match=r"'union' of 4 domains on straight-through switches: .* Hint: -s relaxed=true"
    ):
        trainer = Trainer(config, {name: many[name] for name in names}).open()
    # With three quarters of the channels on, at random, next to none of the switches gets a gradient.
    generator = torch.Generator().manual_seed(0)
    switches = (torch.rand(10, 1000, generator=generator) < 0.75).float().requires_grad_()
    sharing_loss("union", switches, torch.ones(1000), 0.5).backward()
    assert switches.grad is not None
    assert float((switches.grad != 0).float().mean()) < 1e-3
    scores = torch.where(switches.detach() > 0, 7e-3, 3e-3).requires_grad_()
    sharing_loss("union", relax(scores, 5e-3), torch.ones(1000), 0.5).backward()
    assert scores.grad is not None
    assert float((scores.grad != 0).float().mean()) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Trainer(config.replace(relaxed=True), trainer.domains).open()
        Trainer(config.replace(sharing=None), trainer.domains).open()
        three = {name: many[name] for name in names[:3]}
        Trainer(config.replace(domains=names[:3]), three).open()


def test_the_multiplier_alone_brings_a_domain_to_its_budget(suite: dict[str, Domain], tiny: Config) -> None:
    config = tiny.replace(epochs=12, beta=0.5, multiplier_rate=3.0, lr_switch=3e-3, domains=["digits"])
    trainer = Trainer(config, {"digits": suite["digits"]}).open()
    trainer.fit(until=11)
    assert trainer.projected_off == {}
    assert trainer.used("digits") < 0.7
    assert trainer.multipliers["digits"].value > 0


def test_sharing_losses_shrink_the_union(suite: dict[str, Domain], tiny: Config) -> None:
    found = {}
    for sharing in (None, "union", "jaccard"):
        config = tiny.replace(
            epochs=6, beta=0.5, sharing=sharing, relaxed=True, sharing_weight=20.0, lr_switch=3e-3, settle=0.8
        )
        trainer = Trainer(config, suite).open()
        # Domains start apart: each with another part of the channels on.
        for number, name in enumerate(suite):
            generator = torch.Generator().manual_seed(number)
            trainer.bank.write(name, 1e-2 * torch.rand(sum(trainer.bank.sizes), generator=generator))
        trainer.fit()
        # Before the projection, which takes weak channels of each domain by itself.
        record = trainer.log.records[3]
        found[sharing] = record["union"], record["intersection"] / record["union"]
    assert found["union"][0] < found[None][0] - 0.1, found
    assert found["jaccard"][1] > found[None][1] + 0.1, found


def test_a_step_moves_only_what_its_domain_owns(suite: dict[str, Domain], tiny: Config) -> None:
    config = tiny.replace(sharing="int", relaxed=True)
    trainer = Trainer(config, suite).open()
    before = state_of(trainer)
    x, y = next(suite["glyphs"].batches("train", 32, (0,)))
    from bap.train.evaluate import Accuracy

    with bk.use_backend("aten"):
        trainer.ddp_model.train()
        trainer._step("glyphs", x, y, Accuracy())
    changed = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(".domains.glyphs." in name for name in changed)
    kinds = {name.rsplit(".", 1)[1] for name in changed}
    assert kinds == {"score", "weight", "bias", "running_mean", "running_var", "num_batches_tracked"}


def test_the_source_can_be_dense_or_left_out(suite: dict[str, Domain], tiny: Config) -> None:
    dense = Trainer(tiny.replace(epochs=1, source_mode="dense"), suite).open()
    dense.fit()
    assert dense.used("shapes") == 1
    assert dense.used("digits") <= 0.5
    assert dense.log.records[-1]["union"] == 1
    from bap.train.domains import load_domains

    left_out = tiny.replace(source_mode="excluded")
    assert list(load_domains(left_out)) == ["digits", "glyphs"]
    with pytest.raises(ValueError, match="at least one domain besides the source"):
        load_domains(left_out.replace(domains=["shapes"]))


def test_accumulated_gradients_equal_those_of_a_whole_batch(suite: dict[str, Domain], tiny: Config) -> None:
    from bap.train.evaluate import Accuracy

    grads = []
    x, y = next(suite["digits"].batches("train", 32, (0,)))
    for parts in (1, 4):
        trainer = Trainer(tiny.replace(accumulate=parts), suite).open()
        # In eval mode batch norm does not depend on how the batch is cut.
        trainer.model.eval()
        for layer in trainer.bank.layers:
            layer[1].train()
        with bk.use_backend("aten"):
            trainer._step("digits", x, y, Accuracy())
        grads.append({n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None})
    assert list(grads[0]) == list(grads[1])
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-6, msg=name)


def test_progress_is_off_by_default(tiny: Config, suite: dict[str, Domain], capsys: pytest.CaptureFixture) -> None:
    Trainer(tiny, suite).fit(until=1)
    assert capsys.readouterr() == ("", "")
    Trainer(tiny, suite, progress=True).fit(until=1)
    line = capsys.readouterr().err
    assert line.startswith("epoch 1/4  accuracy ")
    assert line.count("\n") == 1


def test_switched_layers_follow_the_settings(tiny: Config, suite: dict[str, Domain]) -> None:
    trainer = Trainer(tiny, suite).open()
    assert "conv1" not in trainer.bank.names
    assert "conv1" in Trainer(tiny.replace(switch_stem=True), suite).open().bank.names
    assert isinstance(trainer.model.get_submodule("conv1"), nn.Conv2d)
    assert SwitchBank(trainer.model).domains == list(suite)


@pytest.mark.skipif(bool(_C.unsupported_reason("native")), reason=str(_C.unsupported_reason("native")))
@pytest.mark.parametrize("taught", [False, True])
def test_steps_take_fast_kernels_and_measure_nothing(
    tiny: Config, suite: dict[str, Domain], tmp_path: Path, taught: bool
) -> None:
    options = {"widths": [32, 32, 32], "blocks": [1, 1, 1]}
    config = tiny.replace(model_options=options, epochs=1, train_backbone=True, backend=None)
    if taught:
        trainer = Trainer(config, suite)
        trainer.fit()
        specs = {name: domain_spec(domain, 1.0, 50.0, "test") for name, domain in suite.items()}
        save_checkpoint(tmp_path, trainer.model, config, specs)
        config = config.replace(teacher=str(tmp_path), distill_weight=0.5)
    assert backend_of(config) == "heuristic"
    states = []
    for backend in (None, None, "native"):
        trainer = Trainer(config.replace(backend=backend), suite).open()
        measured = _C.choices()
        with bk.use_winograd(True):
            trainer.fit()
        assert _C.choices() == measured
        states.append(state_of(trainer))
    assert_states_equal(states[0], states[1])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0]), "these were direct kernels"
