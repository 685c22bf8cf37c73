"""Runs that are stopped, killed or out of disk, and states that are damaged or of another network."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from bap.config import Config
from bap.data import Domain
from bap.files import FileError, read_tensors
from bap.train import Trainer
from bap.train.run_log import read_metrics
from bap.train.state import load_state
from bap.train.trainer import STATE

from tests.bap.train.states import assert_states_equal, state_of

ROOT = Path(__file__).parents[3]


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
    start = state_of(whole)
    whole.fit()
    half = Trainer(config, suite, tmp_path / "halves").open()
    half.fit(until=2)
    assert half.epoch == 2
    rest = Trainer(config, suite, tmp_path / "halves", resume=True).open()
    assert rest.epoch == 2
    rest.fit()
    assert_states_equal(state_of(whole), state_of(rest))
    first, second = read_metrics(tmp_path / "whole"), read_metrics(tmp_path / "halves")
    assert [one["epoch"] for one in second] == [1, 2, 3, 4]
    for a, b in zip(first, second, strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}
    shared = [name for name in start if ".domains." not in name]
    moved = [name for name in shared if not torch.equal(start[name], whole.model.state_dict()[name])]
    assert bool(moved) == config.optimiser.train_backbone
    assert {path.name for path in (tmp_path / "halves").iterdir()} == {STATE, "metrics.jsonl", "tensorboard"}
    assert list((tmp_path / "halves" / "tensorboard").iterdir())


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
    assert_states_equal(state_of(whole), state_of(rest))


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
