"""Joint training: budgets, sharing, round robin, and a resumption that changes no bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from bap.config import Config
from bap.data import Domain, builtin_suite
from bap.files import FileError, read_tensors
from bap.prune.layers import SwitchBank
from bap.train import Trainer, backend_of
from bap.train.checkpoint import domain_spec, save_checkpoint
from bap.train.run_log import read_metrics
from bap.train.sharing import relax, sharing_loss
from bap.train.state import load_state
from bap.train.trainer import STATE
from torch import nn

import bap_kernels as bk
from bap_kernels import _C

ROOT = Path(__file__).parents[3]


def _state(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def _assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert list(a) == list(b)
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


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


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"round_robin": "batch", "sharing": "union", "relaxed": True, "schedule": "cosine"},
        {"train_backbone": True, "ste_every": 3, "accumulate": 2, "settle": 0.75, "backend": None},
        {"sharing": "jaccard", "sharing_learnable": True, "amp": "bf16", "source_mode": "dense"},
        {
            "anneal": "cubic",
            "anneal_until": 1.0,
            "round_robin": "joint",
            "sharing": "union",
            "sharing_schedule": "rise",
        },
        {
            "anneal": "linear",
            "teacher": "FINISHED",
            "distill_weight": 0.5,
            "settle": 0.8,
            "norm": "sgd",
            "lr_norm": 1e-3,
        },
    ],
    ids=["plain", "batch-union", "backbone", "jaccard-bf16", "annealed-joint", "annealed-distilled"],
)
def test_resumed_run_equals_an_uninterrupted_one(
    tiny: Config, suite: dict[str, Domain], finished: Path, tmp_path: Path, changes: dict
) -> None:
    if "teacher" in changes:
        changes = {**changes, "teacher": str(finished / "checkpoint")}
    config = tiny.replace(**changes)
    whole = Trainer(config, suite, tmp_path / "whole").open()
    start = _state(whole)
    whole.fit()
    half = Trainer(config, suite, tmp_path / "halves").open()
    half.fit(until=2)
    assert half.epoch == 2
    rest = Trainer(config, suite, tmp_path / "halves", resume=True).open()
    assert rest.epoch == 2
    rest.fit()
    _assert_equal(_state(whole), _state(rest))
    first, second = read_metrics(tmp_path / "whole"), read_metrics(tmp_path / "halves")
    assert [one["epoch"] for one in second] == [1, 2, 3, 4]
    for a, b in zip(first, second, strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}
    shared = [name for name in start if ".domains." not in name]
    moved = [name for name in shared if not torch.equal(start[name], whole.model.state_dict()[name])]
    assert bool(moved) == config.optimiser.train_backbone
    assert {path.name for path in (tmp_path / "halves").iterdir()} == {STATE, "metrics.jsonl", "tensorboard"}
    assert list((tmp_path / "halves" / "tensorboard").iterdir())


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
    before = _state(trainer)
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


def _start(folder: Path, config: Config, text: str) -> subprocess.Popen:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config.as_dict()))
    script = (
        "import os, resource, signal, sys\n"
        "from bap.config import load_config\nfrom bap.train.domains import load_domains\n"
        "from bap.train import Trainer\n"
        f"config = load_config({str(path)!r})\n"
        f"trainer = Trainer(config, load_domains(config), {str(folder)!r}, resume=True).open()\n" + text
    )
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'python'}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", script], env=env, stderr=subprocess.PIPE, text=True)


def test_killed_in_mid_epoch_only_the_epoch_is_lost(tiny: Config, suite: dict[str, Domain], tmp_path: Path) -> None:
    whole = Trainer(tiny, suite, tmp_path / "whole").open()
    whole.fit()
    folder = tmp_path / "killed"
    folder.mkdir()
    # Dies in the third epoch, by its own hand, between two steps.
    process = _start(
        folder,
        tiny,
        "steps = 0\nstep = trainer._joint_step\n"
        "def counted(*args):\n"
        "    global steps\n    steps += 1\n"
        "    if trainer.epoch == 2 and steps > 29:\n        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    step(*args)\n"
        "trainer._joint_step = counted\ntrainer.fit()\n",
    )
    _, errors = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, errors
    assert [one["epoch"] for one in read_metrics(folder)] == [1, 2]
    rest = Trainer(tiny, suite, folder, resume=True).open()
    assert rest.epoch == 2
    rest.fit()
    _assert_equal(_state(whole), _state(rest))


def test_killed_while_writing_every_file_is_whole(tiny: Config, suite: dict[str, Domain], tmp_path: Path) -> None:
    trainer = Trainer(tiny, suite, tmp_path).open()
    trainer.fit(until=1)
    before = (tmp_path / STATE).read_bytes()
    # As a process leaves it that dies between writing the part and moving it.
    (tmp_path / f".{STATE}.123.part").write_bytes(before[:1000])
    rest = Trainer(tiny, suite, tmp_path, resume=True).open()
    assert rest.epoch == 1
    assert not list(tmp_path.glob(".*.part"))
    # A record whose state was not written any more is dropped.
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(json.dumps({**read_metrics(tmp_path)[0], "epoch": 2}) + "\n")
    rest = Trainer(tiny, suite, tmp_path, resume=True).open()
    rest.fit(until=2)
    assert [one["epoch"] for one in read_metrics(tmp_path)] == [1, 2]


def test_a_full_disk_is_a_clear_error(tiny: Config, suite: dict[str, Domain], tmp_path: Path) -> None:
    Trainer(tiny, suite, tmp_path).fit(until=1)
    before = (tmp_path / STATE).read_bytes()
    # No file may grow beyond 20 kB from here on: the system refuses the write as a full disk does.
    process = _start(
        tmp_path, tiny, "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\ntrainer.fit(until=2)\n"
    )
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "write_bytes(): expected to write" in errors
    assert "Hint: is the disk full? What was there before is unchanged." in errors
    assert (tmp_path / STATE).read_bytes() == before
    assert not list(tmp_path.glob(".*.part"))
    assert Trainer(tiny, suite, tmp_path, resume=True).open().epoch == 1


@pytest.mark.parametrize("damage", ["short", "flipped", "header", "empty"])
def test_a_damaged_state_is_a_clear_error(tiny: Config, suite: dict[str, Domain], tmp_path: Path, damage: str) -> None:
    Trainer(tiny, suite, tmp_path).fit(until=1)
    data = bytearray((tmp_path / STATE).read_bytes())
    if damage == "short":
        data = data[:-100]
    elif damage == "flipped":
        data[-1000] ^= 0x10
    elif damage == "header":
        data[3] ^= 0xFF
    else:
        data = bytearray()
    (tmp_path / STATE).write_bytes(data)
    with pytest.raises(FileError, match="got a damaged file"):
        Trainer(tiny, suite, tmp_path, resume=True).open()


def test_a_state_of_another_network_is_refused(tiny: Config, suite: dict[str, Domain], tmp_path: Path) -> None:
    Trainer(tiny, suite, tmp_path).fit(until=1)
    other = tiny.replace(model_options={"widths": [8, 16, 16], "blocks": [1, 1, 1]})
    with pytest.raises(
        ValueError, match=r"got others: model.options: stored .*'widths': \[8, 8, 16\].*asked .*16, 16\]"
    ):
        Trainer(other, suite, tmp_path, resume=True).open()
    trainer = Trainer(other, suite).open()
    with pytest.raises(FileError, match="to be a state of this network, got one that differs in"):
        load_state(tmp_path / STATE, trainer.model, trainer.optimizers)
    with pytest.raises(FileError, match="got no such file"):
        read_tensors(tmp_path / "nothing.safetensors")


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
        states.append(_state(trainer))
    _assert_equal(states[0], states[1])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0]), "these were direct kernels"
