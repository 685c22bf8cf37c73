"""Pre-training: resumption, validation, mixed precision, and two processes under torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from bap.config import Config
from bap.data import Domain
from bap.files import FileError, read_tensors
from bap.train import pretrain as module
from bap.train.evaluate import accuracy_of
from bap.train.network import plain_network
from bap.train.pretrain import pretrain, state_of

ROOT = Path(__file__).parents[3]


@pytest.fixture
def config(tiny: Config) -> Config:
    return tiny.replace(domains=["digits"], pretrain_epochs=3)


@pytest.fixture
def digits(suite: dict[str, Domain]) -> Domain:
    return suite["digits"]


class _StoppedError(Exception):
    pass


@pytest.fixture
def stopped(config: Config, digits: Domain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a run that was stopped in its second epoch."""
    path, whole = tmp_path / "backbone.safetensors", module._Pretraining.train_epoch

    def train_epoch(self: module._Pretraining, *arguments: object) -> None:
        if self.records:
            raise _StoppedError
        whole(self, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(module._Pretraining, "train_epoch", train_epoch)
        with pytest.raises(_StoppedError):
            pretrain(config, digits, path)
    assert state_of(path).exists()
    assert not path.exists()
    return path


def test_a_resumed_run_equals_one_that_was_not_stopped(config: Config, digits: Domain, stopped: Path) -> None:
    whole = pretrain(config, digits).state_dict()
    pretrain(config, digits, stopped, resume=True)
    weights, info = read_tensors(stopped)
    assert weights.keys() == whole.keys()
    for name, value in weights.items():
        assert torch.equal(value, whole[name]), name
    assert [record["epoch"] for record in info["records"]] == [1, 2, 3]
    assert [file.name for file in stopped.parent.iterdir()] == [stopped.name]


def test_accuracy_on_validation_images_is_recorded(config: Config, digits: Domain, tmp_path: Path) -> None:
    path = tmp_path / "backbone.safetensors"
    model = pretrain(config, digits, path)
    (*_, last) = read_tensors(path)[1]["records"]
    assert last["split"] == "val"
    assert last["evaluated"] == accuracy_of(model, digits, "val", 128, None, 0, 1).percent
    pretrain(config.replace(evaluate_on="train", train_on="train+val", pretrain_epochs=1), digits, path)
    assert "evaluated" not in read_tensors(path)[1]["records"][0]


def test_resumption_refuses_other_settings_data_and_damage(
    config: Config, digits: Domain, suite: dict[str, Domain], stopped: Path
) -> None:
    for changed in ({"pretrain_lr": 0.01}, {"amp": "bf16"}, {"seed": 1}, {"batch": 16}):
        with pytest.raises(ValueError, match=r"expected the settings of .*backbone.state.safetensors, got others"):
            pretrain(config.replace(**changed), digits, stopped, resume=True)
    others = replace(digits, splits={**digits.splits, "train": suite["digits"].splits["val"]})
    with pytest.raises(ValueError, match=r"expected the data that .* was started with"):
        pretrain(config, others, stopped, resume=True)
    state = state_of(stopped)
    whole = state.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", whole[:-1] + bytes([whole[-1] ^ 1])):
        state.write_bytes(damaged)
        with pytest.raises(FileError, match=r"backbone\.state\.safetensors"):
            pretrain(config, digits, stopped, resume=True)


def test_mixed_precision_is_used(config: Config, digits: Domain, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []

    def watched(config: Config, classes: int) -> torch.nn.Module:
        model = plain_network(config, classes)
        model.register_forward_hook(
            lambda module, inputs, result: seen.append(result.dtype) if module.training else None
        )
        return model

    monkeypatch.setattr(module, "plain_network", watched)
    for amp, dtype in ((None, torch.float32), ("bf16", torch.bfloat16)):
        seen.clear()
        pretrain(config.replace(amp=amp, pretrain_epochs=1), digits)
        assert set(seen) == {dtype}


def test_command_never_replaces_a_backbone(bap, config: Config, stopped: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.as_dict()))
    command = ["pretrain", "-c", tmp_path / "config.yaml", "-o", tmp_path, "--no-progress"]
    status, _, errors = bap(*command)
    assert (status, errors.count("\n")) == (2, 1)
    assert "to have no backbone, got backbone.state.safetensors. Hint: --resume" in errors
    status, output, _ = bap(*command, "--resume")
    assert status == 0
    assert json.loads(output)["epoch"] == 3
    assert json.loads(output)["split"] == "val"
    whole = stopped.read_bytes()
    status, _, errors = bap(*command)
    assert "to have no backbone, got backbone.safetensors" in errors
    assert bap(*command, "--resume")[1] == output
    status, _, errors = bap(*command, "--resume", "-s", "pretrain_epochs=4")
    assert status == 2
    assert "pretrain.epochs: stored 3, asked 4" in errors
    assert stopped.read_bytes() == whole


@pytest.mark.slow
def test_two_processes(config: Config, suite: dict[str, Domain], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.replace(pretrain_epochs=2).as_dict()))
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'python'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "bap.cli"]
    arguments = ["pretrain", "-c", str(tmp_path / "config.yaml"), "-o", str(tmp_path / "run")]
    done = subprocess.run([*command, *arguments], env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    # One result, and one line for each epoch.
    printed = json.loads(done.stdout)
    assert [line.split("  ")[0] for line in done.stderr.splitlines() if "%" in line] == [
        "digits epoch 1/2",
        "digits epoch 2/2",
    ]
    path = tmp_path / "run" / "backbone.safetensors"
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    model = plain_network(config.replace(weights=str(path)), len(suite["digits"].classes))
    # What two processes evaluated together is what one finds.
    alone = accuracy_of(model.eval(), suite["digits"], "val", 128, None, 0, 1).percent
    assert printed["evaluated"] == pytest.approx(alone)
