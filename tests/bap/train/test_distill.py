"""Distillation: the loss by its formula, the guard, and a teacher that fits."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bap.config import Config
from bap.data import Domain
from bap.files import FileError
from bap.train.checkpoint import load_checkpoint, save_checkpoint
from bap.train.distill import Teacher, distillation_loss, guarded
from bap.train.evaluate import Accuracy
from bap.train.trainer import STATE, Trainer

import bap_kernels as bk


def _softmax(row: list[float], temperature: float) -> list[float]:
    powers = [math.exp(value / temperature) for value in row]
    return [power / sum(powers) for power in powers]


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_loss_and_its_gradient_by_the_formula(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = 3 * torch.randn(5, 7, generator=generator, dtype=torch.float64)
    loss = distillation_loss(logits, teacher, temperature)
    loss.backward()
    expected, gradient = 0.0, []
    for mine, taught in zip(logits.tolist(), teacher.tolist(), strict=True):
        q, p = _softmax(mine, temperature), _softmax(taught, temperature)
        expected += temperature**2 * sum(t * math.log(t / s) for t, s in zip(p, q, strict=True)) / 5
        gradient.append([temperature * (s - t) / 5 for t, s in zip(p, q, strict=True)])
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(logits.grad, torch.tensor(gradient, dtype=torch.float64))
    with pytest.raises(ValueError, match="expected `temperature` to be positive, got 0"):
        distillation_loss(logits, teacher, 0)
    with pytest.raises(ValueError, match=r"to have the shape of `logits`, \(5, 7\), got \(5, 6\)"):
        distillation_loss(logits, teacher[:, :6], 1.0)


def test_the_guard_bounds_the_term_and_is_a_constant() -> None:
    for term, loss, guard, factor in (
        (3.0, 2.0, 0.5, 1 / 3),
        (3.0, 2.0, 2.0, 1.0),
        (3.0, 2.0, None, 1.0),
        (0, 2, 1, 1),
    ):
        x = torch.tensor(float(term), dtype=torch.float64, requires_grad=True)
        entropy = torch.tensor(float(loss), dtype=torch.float64, requires_grad=True)
        found = guarded(x, entropy, guard)
        found.backward()
        assert found.item() == pytest.approx(term * factor)
        assert x.grad is not None
        assert x.grad.item() == pytest.approx(factor)
        assert entropy.grad is None


def test_a_step_adds_the_teacher_s_loss(finished: Path, suite: dict[str, Domain], tiny: Config) -> None:
    """The gradient in the classifier's bias: mean of softmax(z) − y, and the weighted T (q − p)."""
    gradients = {}
    x, y = next(suite["digits"].batches("train", 32, (0,)))
    settings = {"lr_head": 0.0, "beta": 1.0, "teacher": str(finished / "checkpoint"), "distill_temperature": 2.0}
    for weight in (0.0, 0.3):
        trainer = Trainer(tiny.replace(**settings, distill_weight=weight, distill_guard=None), suite).open()
        with bk.use_backend("aten"):
            trainer.ddp_model.train()
            trainer._step("digits", x, y, Accuracy())
            bk.set_domain(trainer.model, "digits")
        gradients[weight] = trainer.model.fc.domains["digits"].bias.grad
    bank = Trainer(tiny.replace(**settings), suite).open()
    with bk.use_backend("aten"), torch.no_grad():
        bk.set_domain(bank.model.train(), "digits")
        student = bank.model(x).double()
        teacher, _, _ = load_checkpoint(finished / "checkpoint", ["digits"])
        taught = teacher(x).double()
    added = 0.3 * 2.0 * (torch.softmax(student / 2, 1) - torch.softmax(taught / 2, 1)).mean(0)
    torch.testing.assert_close((gradients[0.3] - gradients[0.0]).double(), added, rtol=1e-3, atol=1e-6)


def test_teachers_that_do_not_fit(finished: Path, suite: dict[str, Domain], tiny: Config, tmp_path: Path) -> None:
    path = str(finished / "checkpoint")
    with pytest.raises(
        ValueError,
        match=r"expected `distill.teacher`, .* got None. Hint: -s teacher=dense, or -s teacher=RUN/checkpoint",
    ):
        tiny.replace(distill_weight=1.0)
    classes = tuple(reversed(suite["digits"].classes))
    other = {"digits": replace(suite["digits"], classes=classes)}
    with pytest.raises(ValueError, match=r"'digits' of .* to have the classes and the size of the data, got others"):
        Teacher(path, other, torch.device("cpu"))
    # The same teacher elsewhere is the same; another one is not.
    config = tiny.replace(teacher=path, distill_weight=0.5)
    Trainer(config, suite, tmp_path / "run").fit(until=1)
    shutil.copytree(path, tmp_path / "moved")
    again = Trainer(config.replace(teacher=str(tmp_path / "moved")), suite, tmp_path / "run", resume=True).open()
    assert again.epoch == 1
    assert again.teacher is not None
    assert (tmp_path / "run" / STATE).exists()
    # Nor is another one in its place.
    head = Path(path, "domains", "digits", "domain_config.json")
    before = head.read_bytes()
    copied = config.replace(teacher=str(tmp_path / "moved"))
    Trainer(copied, suite, tmp_path / "again").fit(until=1)
    model, settings, specs = load_checkpoint(tmp_path / "moved")
    save_checkpoint(tmp_path / "moved", model, settings, {n: {**spec, "accuracy": 1.0} for n, spec in specs.items()})
    with pytest.raises(
        ValueError, match=r"distill.teacher: stored .*moved', asked .*moved', whose content has changed"
    ):
        Trainer(copied, suite, tmp_path / "again", resume=True).open()
    assert head.read_bytes() == before
    changed = tmp_path / "moved" / "domains" / "glyphs" / "domain_config.json"
    changed.write_bytes((tmp_path / "moved" / "domains" / "digits" / "domain_config.json").read_bytes())
    with pytest.raises((ValueError, FileError), match=r"distill.teacher|to be of 'glyphs'"):
        Trainer(config.replace(teacher=str(tmp_path / "moved")), suite, tmp_path / "run", resume=True).open()
    with pytest.raises(ValueError, match=r"distill.teacher: stored .*checkpoint', asked None"):
        Trainer(config.replace(teacher=None, distill_weight=0.0), suite, tmp_path / "run", resume=True).open()


def test_a_checkpoint_needs_no_teacher(finished: Path, suite: dict[str, Domain], tiny: Config, tmp_path: Path) -> None:
    from bap.results.run import train_run

    teacher = shutil.copytree(finished / "checkpoint", tmp_path / "teacher")
    train_run(tiny.replace(epochs=1, teacher=str(teacher), distill_weight=0.5), tmp_path / "run", domains=suite)
    shutil.rmtree(teacher)
    _, config, _ = load_checkpoint(tmp_path / "run" / "checkpoint")
    assert (config.distill.teacher, config.distill.weight) == (None, 0)
