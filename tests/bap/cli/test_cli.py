"""The command line: a user's mistake is one line and exit status 2; results are one JSON on the standard output."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from bap.cli import main
from bap.config import Config, load_config
from bap.results.run import train_run
from bap.train.checkpoint import save_checkpoint
from bap.train.lock import folder_lock
from bap.train.network import switched_network

ROOT = Path(__file__).parents[3]
SMALL = {
    "domains": ["digits", "signs"],
    "images": 100,
    "model_options": {"widths": [4, 4, 4], "blocks": [1, 1, 1]},
    "epochs": 2,
    "batch": 32,
    "threads": 1,
    "backend": "aten",
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    return path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    settings = Config(**SMALL)
    specs = {"size": 32, "kept": 1.0, "accuracy": 50.0}
    classes = {"digits": [str(one) for one in range(10)]}
    model = switched_network(settings, {"digits": 10})
    save_checkpoint(tmp_path / "checkpoint", model, settings, {n: {"classes": c, **specs} for n, c in classes.items()})
    return tmp_path / "checkpoint"


def test_a_run_without_a_terminal_prints_its_progress(bap, config: Path, tmp_path: Path) -> None:
    status, output, errors = bap("train", "-c", config, "-o", tmp_path / "run", "-s", "log_every=2")
    assert status == 0
    results = json.loads(output)
    assert results["domains"] == ["digits", "signs"]
    lines = errors.splitlines()
    # Six steps of an epoch, three of each domain.
    assert [line.split("  ")[:2] for line in lines if "step" in line] == [
        [f"epoch {epoch}/2", f"step {step}/6"] for epoch in (1, 2) for step in (2, 4, 6)
    ]
    assert [line.split("  ")[0] for line in lines if "accuracy" in line] == ["epoch 1/2", "epoch 2/2"]
    status, output, errors = bap("train", "-c", config, "-o", tmp_path / "silent", "--no-progress")
    assert (status, errors) == (0, "")
    assert json.loads(output)["accuracy"] == results["accuracy"]
    status, output, errors = bap("train", "-c", config, "-o", tmp_path / "run", "--resume", "-s", "beta=.25")
    assert (status, output) == (2, "")
    assert "beta: stored 0.5, asked 0.25" in errors
    assert errors.count("\n") == 1


MISTAKES = [
    (["train", "-o", "{}/a", "-s", "beta=[0.5"], "the value of 'beta=[0.5' to be YAML"),
    (["train", "-o", "{}/a", "-s", "lr_head=-1"], "`optimiser.lr_head` to be greater than or equal to 0, got -1"),
    (["train", "-o", "{}/a", "-s", "beta=2"], "to be less than or equal to 1, got 2. (From -s budget.beta.)"),
    (["train", "-o", "{}/a", "-s", "betta=1"], "got 'betta'. Hint: beta? (From -s betta.)"),
    (["train", "-o", "{}/a", "-c", "{}/no.yaml"], "expected `path` to be a YAML file"),
    (["train", "-o", "{}/a", "-s", "data=decathlon"], "expected `data.root`, the folder of 'decathlon'"),
    (["train", "-o", "{}/a", "-s", "device=cuda:9"], "got 'cuda:9' where PyTorch finds"),
    (["train", "-o", "{}/a", "-s", "domains=[faces]"], "got 'faces'"),
    (["train", "-o", "{}/a", "-s", "images=100", "-s", "weights={}/none.pth"], "none.pth"),
    (["train", "-o", "{}/a", "-s", "images=100", "-s", "weights=/dev/null"], "tensors, got /dev/null: EOFError"),
    (["train", "-o", "{}/file", "-s", "images=100"], "expected a folder {}/file to write to"),
    (["train", "-o", "{}/a", "-c", "{}"], "to be a YAML file, got {}"),
    (["train", "-o", "{}/a", "-s", "data=decathlon", "-s", "root={}"], "{}/annotations/imagenet12_train.json, got"),
    (["train", "-o", "{}/a", "-s", "data=sketch", "-s", "root={}"], "the folder {}/imagenet/train, got none. Hint"),
    (["train", "-o", "{}/a", "--baseline", "{}/wrong.json"], "expected {}/wrong.json to hold {domain: accuracy"),
    (["train", "-o", "{}/a", "--callback", "mine"], "`name` to be package.module:Class, got 'mine'"),
    (["study", "-o", "{}/a", "--variant", "anneal=cubic"], "expected --variant NAME:KEY=VALUE, got 'anneal=cubic'"),
    (["study", "-o", "{}/a", "--variant", "x:beta=1"], "got budget.beta in 'x'"),
    (["study", "-o", "{}/a", "--compare", "dens"], "matches to be among ['dense', 'narrow',"),
    (["study", "-o", "{}/a", "--compare", "dense", "--match", "time"], "['flop', 'exact_flop'], got ['time']"),
    (["train", "-o", "{}/a", "-s", "teacher={}/none", "-s", "distill_weight=1", "-s", "images=100"], "{}/none/config"),
    (["train", "-o", "{}/a", "-s", "fixed={}/none", "-s", "images=100"], "{}/none"),
    (["pretrain", "-o", "{}/a", "-s", "source=faces", "-s", "images=100"], "the source 'faces' to be among"),
    (["pretrain", "-o", "{}/a", "-s", "device=cuda:9"], "got 'cuda:9' where PyTorch finds"),
    (["eval", "{}/other"], "config.json to be a JSON file"),
    (["eval", "{}"], "expected {} to be a checkpoint, got the folder of a run. Hint: {}/checkpoint."),
    (["export", "{}/checkpoint", "-o", "/proc/files", "-f", "pt2"], "to read or write /proc/files, got: No such file"),
    (["export", "{}/checkpoint", "-o", "{}/files", "-f", "onx"], "`formats` to name only onnx, "),
    (["eval", "{}/checkpoint", "-d", "signs"], "to have one of ['digits'], got 'signs'"),
    (["eval", "{}/checkpoint", "--predictions", "{}/p.json"], "to be in the decathlon's format"),
    (["prune", "{}/file"], "config.json to be a JSON file"),
    (["speed", "{}/none"], "config.json to be a JSON file, got no such file."),
    (["info", "{}/none"], "config.json to be a JSON file"),
    (["add-domain", "{}/none", "signs"], "config.json to be a JSON file"),
    (["add-domain", "{}/checkpoint", "digits"], "expected `name` to be new, got 'digits'"),
    (["add-domain", "{}/checkpoint", "faces"], "got 'faces'"),
    (["add-domain", "{}/checkpoint", "signs", "--like", "faces"], "`like` to be one of ['digits'], got 'faces'"),
    (["add-domain", "{}/checkpoint", "signs", "-s", "lr_switch=fast"], "to be a valid number, got 'fast'"),
    (["add-domain", "{}/checkpoint", "signs", "-s", "epochs"], "overrides like name=value"),
    (["add-domain", "{}/checkpoint", "signs", "-s", "betta=1"], "got 'betta'"),
    (["add-domain", "{}/checkpoint", "signs", "-s", "model=wrn28_4"], "expected 'model.name' to stay as in"),
    (["add-domain", "{}/checkpoint", "signs", "-s", "threshold=1e-3"], "expected 'switches.threshold' to stay as in"),
    (["add-domain", "{}/checkpoint", "signs", "-s", "train_backbone=true"], "`optimiser.train_backbone` to be off"),
    (["scores", "{}/none.json"], "to be a JSON file"),
    (["scores", "{}/list.json"], "to hold {domain: accuracy in per cent}"),
    (["scores", "{}/wrong.json"], "to hold {domain: accuracy in per cent}"),
    (["scores", "{}/half.json"], "half.json to be as a run wrote it"),
    (["scores", "{}/good.json", "--baseline", "imagenet"], "imagenet to be a JSON file"),
    (["scores", "{}/good.json", "--baseline", "sketch"], "`baseline` to have 'dtd'"),
    (["scores", "{}/good.json", "--flop", "0"], "`flop` to be positive"),
    (["scores", "{}/good.json", "--flop", "nan"], "`flop` to be positive"),
    (["scores", "{}/much.json"], "from 0 to 100, got 170"),
    (["report", "{}/none", "-o", "{}/r"], "results.json to be a JSON file"),
    (["study", "-o", "{}/a", "--beta", "2"], "`budget.beta` to be less than or equal to 1, got 2.0"),
    (["study", "-o", "{}/a", "--sharing", "all"], "`sharing.loss` to be one of"),
    (["study", "-o", "{}/a", "--seed", "-1"], "`run.seed` to be greater than or equal to 0"),
    (["estimate", "-s", "data=builtin"], "expected `images` for 'builtin'"),
    (["demo", "-o", "{}/a", "-s", "epochs=none"], "`schedule.epochs` to be a valid integer"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"), MISTAKES, ids=lambda one: " ".join(one) if isinstance(one, list) else ""
)
def test_mistakes_are_one_line(bap, checkpoint: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "wrong.json").write_text('{"dtd": "high"}')
    (tmp_path / "half.json").write_text('{"accuracy": {"dtd": 70}}')
    (tmp_path / "good.json").write_text('{"dtd": 70}')
    (tmp_path / "much.json").write_text('{"dtd": 170}')
    status, output, errors = bap(*[one.replace("{}", str(tmp_path)) for one in arguments])
    assert message.replace("{}", str(tmp_path)) in errors
    assert (status, output) == (2, "")
    assert errors.startswith("bap: ")
    assert errors.count("\n") == 1
    assert "Traceback" not in errors
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("error", [KeyError("x"), TypeError("x"), RuntimeError("x"), AssertionError()])
def test_defects_keep_their_traceback(monkeypatch: pytest.MonkeyPatch, checkpoint: Path, error: Exception) -> None:
    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr("bap.train.checkpoint.load_checkpoint", broken)
    monkeypatch.setattr("sys.argv", ["bap", "info", str(checkpoint)])
    with pytest.raises(type(error)):
        main()


def test_prune_never_mixes_two_networks_in_a_folder(bap, checkpoint: Path, tmp_path: Path) -> None:
    other, specs = tmp_path / "other", {"size": 32, "classes": ["a", "b"]}
    save_checkpoint(other, switched_network(Config(**SMALL), {"signs": 2}), Config(**SMALL), {"signs": specs})
    files = {path: path.read_bytes() for path in other.rglob("*") if path.is_file()}
    status, _, errors = bap("prune", checkpoint, "-o", other)
    assert status == 2
    assert errors == f"bap: bap prune: expected {other} to have no other network, got one with ['signs'].\n"
    assert files == {path: path.read_bytes() for path in other.rglob("*") if path.is_file()}


def test_add_domain_parses_exponents_without_a_point(bap, checkpoint: Path) -> None:
    settings = ["-s", "lr_switch=1e-3", "-s", "epochs=1"]
    status, output, errors = bap("add-domain", checkpoint, "signs", *settings)
    assert status == 0, errors
    found = json.loads(output)
    assert found["split"] == "test"
    assert (checkpoint / "domains" / "signs" / "domain_config.json").exists()
    assert not (checkpoint / ".lock").exists()


def test_data_with_other_classes_are_not_evaluated(bap, checkpoint: Path) -> None:
    settings = Config(**SMALL)
    model = switched_network(settings, {"digits": 10})
    names = [str(one) for one in reversed(range(10))]
    save_checkpoint(checkpoint, model, settings, {"digits": {"classes": names, "size": 32}})
    status, _, errors = bap("eval", checkpoint)
    assert status == 2
    assert "to have the classes that" in errors


def test_a_folder_in_use_is_refused_by_every_command_that_writes(bap, checkpoint: Path, tmp_path: Path) -> None:
    import threading

    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with folder_lock(tmp_path / "out"), folder_lock(checkpoint):
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    try:
        for arguments in (
            ["train", "-o", tmp_path / "out", "-s", "images=100"],
            ["train", "-o", tmp_path / "out", "-s", "images=100", "--resume"],
            ["pretrain", "-o", tmp_path / "out", "-s", "images=100"],
            ["study", "-o", tmp_path / "out", "-s", "images=100"],
            ["demo", "-o", tmp_path / "out", "-s", "images=100"],
            ["add-domain", checkpoint, "signs"],
            ["prune", checkpoint, "-o", tmp_path / "out"],
        ):
            status, _, errors = bap(*arguments)
            assert status == 2
            assert "expected no other run in" in errors, arguments
        assert bap("info", checkpoint)[0] == 0
    finally:
        done.set()
        thread.join()


def _python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'python'}", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, timeout=500)


def test_a_missing_package_names_the_extra(tmp_path: Path) -> None:
    script = "import sys\nsys.modules[sys.argv.pop(1)] = None\nfrom bap.cli import main\nsys.argv[0] = 'bap'\nmain()\n"
    for package, arguments in (("typer", ["--help"]), ("yaml", ["train", "-o", str(tmp_path)])):
        done = _python("-c", script, package, *arguments)
        assert done.returncode == 2
        assert (
            done.stderr == f"bap: expected the package {package!r}, got none. Hint: pip install 'bap_kernels[method]'\n"
        )


def test_process_group_is_destroyed_after_an_error(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    join = torch.distributed.init_process_group
    monkeypatch.setattr(
        torch.distributed,
        "init_process_group",
        lambda backend: join(backend, init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1),
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    at_exit: list[Callable[[], None]] = []
    monkeypatch.setattr("atexit.register", at_exit.append)
    (tmp_path / "results.json").write_text("{}")
    try:
        with pytest.raises(ValueError, match="to have no run, got one"):
            train_run(load_config(config), tmp_path)
        assert torch.distributed.is_initialized()
    finally:
        for one in at_exit:
            one()
    assert not torch.distributed.is_initialized()


def test_other_commands_refuse_torchrun(bap, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, errors = bap("info", checkpoint)
    assert status == 2
    assert "bap info: expected one process, got 2" in errors
