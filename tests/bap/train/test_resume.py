"""A run goes on with its own settings, data and weights, or not at all."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bap.config import SHORT_NAMES, Config, load_config
from bap.data import Arrays, Domain
from bap.files import FileError, write_tensors
from bap.models import build
from bap.results.run import train_run
from bap.results.study import StudyGrid, study
from bap.train.finite import TrainError
from bap.train.resume import MAY_CHANGE, check_same_settings
from bap.train.run_log import read_metrics
from bap.train.trainer import STATE, Trainer


def _domain(name: str = "a", seed: int = 0, val: bool = True) -> Domain:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8, generator=generator)
    split = Arrays(images, torch.tensor([0, 1] * 4))
    return Domain(name, ("x", "y"), {"train": split, **({"val": split} if val else {})}, 8)


@pytest.fixture
def config() -> Config:
    options = {"widths": [4, 4, 4], "blocks": [1, 1, 1]}
    return Config(model_options=options, epochs=4, batch=4, beta=0.5, sharing="union", threads=1, backend="aten")


@pytest.fixture
def half(config: Config, tmp_path: Path) -> Path:
    """A run after two of four epochs."""
    Trainer(config, {"a": _domain()}, tmp_path / "run").fit(until=2)
    return tmp_path / "run"


def _resumed(config: Config, folder: Path, **changes: object) -> dict:
    return train_run(config.replace(**changes), folder, resume=True, domains={"a": _domain()})


# Another value of every setting that may not change in a run.
OTHERS = {
    "beta": 0.25,
    "sharing": "int",
    "sharing_weight": 2.0,
    "measure": "param",
    "lr_head": 1e-2,
    "lr_switch": 1e-3,
    "batch": 2,
    "accumulate": 2,
    "seed": 1,
    "schedule": "cosine",
    "settle": 0.9,
    "round_robin": "batch",
    "evaluate_on": "val",
    "train_backbone": True,
    "amp": "bf16",
    "full": False,
    "images": 100,
    "threshold": 1e-3,
    "keep_at_least": 2,
    "anneal": "linear",
    "give_back": True,
    "sharing_schedule": "fall",
    "milestones": [0.5],
    "norm": "sgd",
    "train_on": "train",
}


def test_resume_refuses_changed_settings(config: Config, half: Path) -> None:
    before = {path: path.read_bytes() for path in half.rglob("*") if path.is_file()}
    for name, value in OTHERS.items():
        full, settings = SHORT_NAMES[name], config.by_name()
        if settings[full] == value:
            continue
        with pytest.raises(ValueError) as caught:
            _resumed(config, half, **{name: value})
        assert f"{full}: stored {settings[full]!r}, asked {value!r}" in str(caught.value)
    with pytest.raises(ValueError, match=r"budget.beta: stored 0.5, asked 0.25; sharing.loss: stored 'union'"):
        _resumed(config, half, beta=0.25, sharing="int")
    assert {path: path.read_bytes() for path in half.rglob("*") if path.is_file()} == before
    # Every setting is either compared or on the short list.
    others = {SHORT_NAMES[name]: value for name, value in OTHERS.items()}
    for full, value in config.by_name().items():
        if others.get(full, value) != value:
            assert full not in MAY_CHANGE
            with pytest.raises(ValueError, match=f"{full}: stored"):
                check_same_settings({**config.by_name(), full: others[full]}, config, "there")


def test_resume_accepts_changed_device_settings(config: Config, half: Path) -> None:
    results = _resumed(config, half, workers=1, log_every=1, threads=None, root="elsewhere")
    assert results["split"] == "val"
    assert [one["epoch"] for one in read_metrics(half)] == [1, 2, 3, 4]
    assert load_config(half / "config.yaml").data.root == "elsewhere"
    # A finished run is not changed either.
    with pytest.raises(ValueError, match=r"beta: stored 0.5, asked 0.75"):
        _resumed(config, half, beta=0.75)


def test_resume_accepts_more_epochs_if_the_schedule_allows(config: Config, half: Path, tmp_path: Path) -> None:
    assert _resumed(config, half, epochs=6)["beta"] == 0.5
    whole = Trainer(config.replace(epochs=6), {"a": _domain()}, tmp_path / "whole").open()
    whole.fit()
    longer = Trainer(config.replace(epochs=6), {"a": _domain()}, half, resume=True).open()
    assert longer.epoch == 6
    for name, value in whole.model.state_dict().items():
        assert torch.equal(longer.model.state_dict()[name], value), name
    # The budget was projected at the end; a cosine would have had other rates from the second epoch on.
    with pytest.raises(ValueError, match="epochs: stored 6, asked 8"):
        _resumed(config, half, epochs=8)
    cosine = config.replace(schedule="cosine")
    Trainer(cosine, {"a": _domain()}, tmp_path / "cosine").fit(until=2)
    with pytest.raises(ValueError, match="epochs: stored 4, asked 6"):
        _resumed(cosine, tmp_path / "cosine", epochs=6)
    # So would an annealed budget.
    annealed = config.replace(anneal="linear")
    Trainer(annealed, {"a": _domain()}, tmp_path / "annealed").fit(until=2)
    with pytest.raises(ValueError, match="epochs: stored 4, asked 6"):
        _resumed(annealed, tmp_path / "annealed", epochs=6)


def test_other_data_are_refused(config: Config, half: Path) -> None:
    one = _domain()
    assert isinstance(one.splits["train"], Arrays)
    one.splits["train"] = Arrays(one.splits["train"].images[:6], torch.tensor([0, 1] * 3))
    with pytest.raises(ValueError, match=r"started with, got others for \['a'\]"):
        train_run(config, half, resume=True, domains={"a": one})
    named = replace(_domain(), classes=("y", "x"))
    with pytest.raises(ValueError, match=r"started with, got others for \['a'\]"):
        train_run(config, half, resume=True, domains={"a": named})


def test_resume_refuses_other_weights_but_not_another_path(config: Config, tmp_path: Path) -> None:
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = build("resnet26", 2, **config.model.options)
        write_tensors(tmp_path / f"{seed}.safetensors", model.state_dict(), {})
    config = config.replace(weights=str(tmp_path / "0.safetensors"))
    Trainer(config, {"a": _domain()}, tmp_path / "run").fit(until=1)
    with pytest.raises(ValueError, match=r"weights: stored .*0.safetensors', asked .*1.safetensors'"):
        _resumed(config, tmp_path / "run", weights=str(tmp_path / "1.safetensors"))
    shutil.copy(tmp_path / "0.safetensors", tmp_path / "moved.safetensors")
    assert _resumed(config, tmp_path / "run", weights=str(tmp_path / "moved.safetensors"))["split"] == "val"


def test_a_run_that_saved_no_state_yet_has_its_settings(config: Config, tmp_path: Path) -> None:
    train_run(config, tmp_path / "run", domains={"a": _domain()})
    for name in (STATE, "metrics.jsonl", "results.json"):
        (tmp_path / "run" / name).unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoint")
    with pytest.raises(ValueError, match=r"config.yaml, got others: budget.beta: stored 0.5, asked 0.75"):
        _resumed(config, tmp_path / "run", beta=0.75)


@pytest.mark.parametrize("name", ["metrics.jsonl", STATE, "results.json", "checkpoint"])
def test_folder_with_part_of_a_run_needs_resume(config: Config, tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=r"to have no run, got one\. Hint: --resume"):
        train_run(config, tmp_path, domains={"a": _domain()})


def test_a_study_refuses_runs_and_weights_of_other_settings(config: Config, tmp_path: Path) -> None:
    small = config.replace(domains=["digits", "signs"], images=100, epochs=1, pretrain_epochs=1, batch=32)
    study(small, tmp_path, StudyGrid((0.5,), (None,), (0,), False), lambda line: None)
    with pytest.raises(ValueError, match=r"pretrain.lr: stored 0.05, asked 0.01"):
        study(small.replace(pretrain_lr=0.01), tmp_path, StudyGrid((0.5,), (None,), (0,), False), lambda line: None)
    with pytest.raises(ValueError, match=r"lr_norm: stored 0.0001, asked 0.1"):
        study(small.replace(lr_norm=0.1), tmp_path, StudyGrid((0.5,), (None,), (0,), False), lambda line: None)
    with pytest.raises(ValueError, match=r"`budget.beta` to be less than or equal to 1, got 2"):
        study(small, tmp_path / "new", StudyGrid((0.5, 2), (None,), (0,), False), lambda line: None)
    assert not (tmp_path / "new").exists()


def test_missing_labels_are_found_before_training(config: Config, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected 'a' to have images with labels in 'val', got no such split"):
        train_run(config, tmp_path / "run", domains={"a": _domain(val=False)})
    domain = _domain()
    assert isinstance(domain.splits["val"], Arrays)
    domain.splits["val"] = Arrays(domain.splits["val"].images, None)
    with pytest.raises(ValueError, match=r"labels in 'val', got no labels"):
        train_run(config, tmp_path / "run", domains={"a": domain})
    with pytest.raises(ValueError, match=r"labels in 'test', got no such split"):
        train_run(config.replace(evaluate_on="test"), tmp_path / "run", domains={"a": _domain()})
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file()]


def test_one_split_for_all_domains(config: Config) -> None:
    tested = _domain("b")
    tested.splits["test"] = tested.splits["val"]
    results = train_run(config.replace(epochs=1), None, domains={"b": tested})
    assert results["split"] == "test"
    results = train_run(config.replace(epochs=1), None, domains={"b": tested, "a": _domain()})
    assert results["split"] == "val"
    assert results["domains"] == ["b", "a"]


@pytest.mark.filterwarnings("ignore")
def test_losses_that_are_not_finite_stop_the_run(config: Config, half: Path) -> None:
    before = (half / STATE).read_bytes()
    wild = config.replace(lr_head=1e30, lr_norm=1e30)
    with pytest.raises(TrainError, match=r"to stay finite, got another .* in epoch 1\. Hint: lower a learning rate"):
        train_run(wild, half.parent / "wild", domains={"a": _domain()})
    trainer = Trainer(config, {"a": _domain()}, half, resume=True).open()
    with torch.no_grad():
        next(trainer.model.parameters()).fill_(float("nan"))
    with pytest.raises(TrainError, match="in epoch 3"):
        trainer.fit()
    assert (half / STATE).read_bytes() == before
    assert [one["epoch"] for one in read_metrics(half)] == [1, 2]


def test_damaged_records_and_results_are_named(config: Config, half: Path) -> None:
    from bap.train.run_log import read_results

    lines = (half / "metrics.jsonl").read_text().splitlines()
    for wrong in ("{", "[]", json.dumps({**json.loads(lines[1]), "union": None}), '{"epoch": "2"}'):
        (half / "metrics.jsonl").write_text(f"{lines[0]}\n{wrong}\n")
        with pytest.raises(FileError, match=r"line 2 of .*metrics.jsonl"):
            Trainer(config, {"a": _domain()}, half, resume=True).open()
    for wrong in ("{}", "[]", '{"accuracy": {"a": "x"}}'):
        (half / "results.json").write_text(wrong)
        with pytest.raises(FileError, match=r"results.json to be as a run wrote it"):
            read_results(half)
