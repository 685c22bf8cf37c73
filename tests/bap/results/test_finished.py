"""After training: checkpoints by domain, pruning, new domains, reports, and the command line."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
import yaml
from bap.cli import main
from bap.cli.commands import app
from bap.config import Config, load_config
from bap.data import Domain, builtin_suite
from bap.files import FileError
from bap.prune.counting import count
from bap.prune.layers import SwitchBank
from bap.prune.prune import PruneError, prune_
from bap.results.demo import run_demo
from bap.results.estimate import estimate
from bap.results.report import make_report
from bap.results.run import train_run
from bap.results.scores import score
from bap.results.study import study
from bap.train.checkpoint import domains_of, load_checkpoint, save_domain
from bap.train.evaluate import evaluate
from bap.train.network import switched_network
from bap.train.new_domain import add_domain
from typer.testing import CliRunner

import bap_kernels as bk


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, settings: dict) -> Path:
    """A finished run; tests that write take a copy."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    config = Config(
        **{**settings, "epochs": 6, "sharing": "union", "relaxed": True, "sharing_weight": 4.0, "settle": 0.7}
    )
    train_run(config, folder, baseline={"shapes": 60.0, "digits": 60.0, "glyphs": 60.0})
    return folder


def _codes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_run_leaves_its_files(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    assert set(results["accuracy"]) == {"shapes", "digits", "glyphs"}
    assert all(value <= 0.5 for value in results["kept"].values())
    assert results["cost"]["params"] < results["cost"]["flop"] + 1
    assert results["scores"]["S_O"] == pytest.approx(results["scores"]["S"] / results["cost"]["flop"])
    assert load_config(finished / "config.yaml").sharing.loss == "union"
    assert set(_codes(finished / "checkpoint")) == {
        "config.json",
        "model.safetensors",
        *(
            f"domains/{name}/{file}"
            for name in results["accuracy"]
            for file in ("domain.safetensors", "domain_config.json")
        ),
    }
    with pytest.raises(ValueError, match=r"to have no run, got one. Hint: --resume"):
        train_run(load_config(finished / "config.yaml"), finished)


def test_loading_one_domain_reads_no_other(finished: Path, copy_of) -> None:
    folder = copy_of(finished / "checkpoint")
    for file in (folder / "domains" / "digits").iterdir():
        file.write_bytes(b"damaged")
    whole, _, _ = load_checkpoint(finished / "checkpoint")
    one, _, facts = load_checkpoint(folder, ["glyphs"])
    assert list(facts) == ["glyphs"]
    assert not [key for key in one.state_dict() if ".digits." in key or ".shapes." in key]
    x = torch.randn(3, 3, 32, 32)
    bk.set_domain(whole, "glyphs")
    with bk.use_backend("aten"), torch.inference_mode():
        assert torch.equal(one(x), whole(x))
    with pytest.raises(FileError, match="to be a JSON file"):
        load_checkpoint(folder, ["digits"])
    with pytest.raises(FileError, match=r"to have one of .*got 'signs'"):
        load_checkpoint(folder, ["signs"])


@pytest.mark.parametrize("file", ["model.safetensors", "domains/glyphs/domain.safetensors"])
def test_damaged_checkpoints_are_refused(finished: Path, copy_of, file: str) -> None:
    folder = copy_of(finished / "checkpoint")
    data = bytearray((folder / file).read_bytes())
    data[-5] ^= 1
    (folder / file).write_bytes(data)
    with pytest.raises(FileError, match="got a damaged file"):
        load_checkpoint(folder, ["glyphs"])
    (folder / "config.json").unlink()
    with pytest.raises(FileError, match=r"config.json to be a JSON file"):
        load_checkpoint(folder)


def test_nothing_is_pickled(finished: Path) -> None:
    for path in finished.rglob("*.safetensors"):
        assert path.read_bytes()[8:9] == b"{"
    assert not [path for path in finished.rglob("*") if path.suffix in (".pt", ".pth", ".pkl", ".bin")]


def test_pruning_keeps_every_output_and_the_file_gets_smaller(finished: Path, tmp_path: Path) -> None:
    from bap.train.checkpoint import save_checkpoint

    model, config, facts = load_checkpoint(finished / "checkpoint")
    x = torch.randn(4, 3, 32, 32)
    expected = {}
    with bk.use_backend("aten"), torch.inference_mode():
        for name in facts:
            bk.set_domain(model, name)
            expected[name] = model(x).clone()
    made = prune_(model, torch.zeros(1, 3, 32, 32))
    assert made.largest_change <= 1e-5
    assert made.after.weights < made.before.weights
    assert made.after.weights == sum(
        int((conv.weight != 0).any((2, 3)).sum()) * conv.weight[0, 0].numel()
        for conv in model.modules()
        if isinstance(conv, torch.nn.Conv2d)
    )
    assert [row["domain"] for row in made.as_rows()] == ["shapes", "digits", "glyphs", "union"]
    save_checkpoint(tmp_path / "pruned", model, config, facts, kept=(made.rows, made.columns))
    loaded, _, _ = load_checkpoint(tmp_path / "pruned")
    with bk.use_backend("aten"), torch.inference_mode():
        for name, value in expected.items():
            bk.set_domain(loaded, name)
            torch.testing.assert_close(loaded(x), value, rtol=1e-5, atol=1e-6)
    small, large = (path / "model.safetensors" for path in (tmp_path / "pruned", finished / "checkpoint"))
    assert small.stat().st_size < large.stat().st_size
    assert count(loaded, torch.zeros(1, 3, 32, 32)).as_dict() == made.after.as_dict()


def test_pruning_what_is_used_is_found_out(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    model = switched_network(tiny, {"a": 3, "b": 2}).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def wrong(*_: object) -> tuple[dict, dict]:
        weight = model.layer3[0].conv1.weight
        rows = torch.ones(len(weight), dtype=torch.bool)
        return {"layer3.0.conv1": rows.index_fill(0, torch.tensor([0]), False)}, {"layer3.0.conv1": torch.ones(8) > 0}

    monkeypatch.setattr("bap.prune.prune.kept_of", wrong)
    with pytest.raises(PruneError, match=r"to stay within 1e-05, got .* for 'a'; nothing was changed"):
        prune_(model, torch.zeros(1, 3, 32, 32))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_new_domain_leaves_the_others_untouched(finished: Path, copy_of) -> None:
    folder = copy_of(finished / "checkpoint")
    before = _codes(folder)
    data = builtin_suite(["textures"], 100)["textures"]
    facts = add_domain(folder, "textures", {"epochs": 3, "batch": 16}, data=data, progress=False)
    after = _codes(folder)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {f"domains/textures/{n}" for n in ("domain.safetensors", "domain_config.json")}
    assert domains_of(folder) == ["shapes", "digits", "glyphs", "textures"]
    assert facts["kept"] <= 0.5
    model, _, _ = load_checkpoint(folder, ["textures"])
    with bk.use_backend("aten"):
        assert evaluate(model, data).percent == facts["accuracy"]
    with pytest.raises(ValueError, match="to be new, got 'textures'"):
        add_domain(folder, "textures", data=data)
    with pytest.raises(ValueError, match=r"`optimiser.train_backbone` to be off"):
        add_domain(folder, "signs", {"train_backbone": True}, data=data)


def test_names_that_are_no_folders_are_refused(tiny: Config, tmp_path: Path) -> None:
    model = switched_network(tiny, {"a": 3})
    for name in ("../a", "/a", "a/b"):
        with pytest.raises(ValueError, match="it is the name of a folder"):
            save_domain(tmp_path, model, name, {})
    with pytest.raises(ValueError, match="to have the domain 'b'"):
        save_domain(tmp_path, model, "b", {})


def test_report(finished: Path, tmp_path: Path) -> None:
    path = make_report([finished], tmp_path / "report")
    text = path.read_text()
    assert "| run | 0.5 | union | test |" in text
    for picture in ("kept.png", "curves.png", "accuracy_budget.png"):
        assert f"]({picture})" in text
        assert (path.parent / picture).read_bytes().startswith(b"\x89PNG")


def test_study_goes_on_where_it_stopped(tiny: Config, suite: dict[str, Domain], tmp_path: Path) -> None:
    config = tiny.replace(epochs=1, pretrain_epochs=1, domains=["shapes", "digits"])
    said: list[str] = []
    study(config, tmp_path, (0.5,), (None,), (0, 1), True, said.append)
    assert len(said) == 2
    path = study(config, tmp_path, (0.5,), (None, "int"), (0, 1), True, said.append)
    assert len(said) == 4
    lines = path.read_text().splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("| 0.5 | none | test | 2 | ")
    assert lines[3].startswith("| 0.5 | int | test | 2 | ")
    rows = json.loads((tmp_path / "study.json").read_text())["rows"]
    assert [(row["seed"], row["sharing"]) for row in rows] == [(0, None), (0, "int"), (1, None), (1, "int")]
    mean = sum(row["mean_accuracy"] for row in rows if row["sharing"] == "int") / 2
    assert f"| {mean:.1f} ± " in lines[3]


def test_study_scores_cells_that_were_run_before_their_baseline(
    tiny: Config, suite: dict[str, Domain], tmp_path: Path
) -> None:
    config = tiny.replace(epochs=1, pretrain_epochs=1, domains=["shapes", "digits"])
    for baseline in (False, True):
        study(config, tmp_path, (0.5,), (None,), (0,), baseline, lambda line: None)
        (row,) = json.loads((tmp_path / "study.json").read_text())["rows"]
        assert ("scores" in row) == baseline
    whole = json.loads((tmp_path / "baseline_seed0.json").read_text())
    assert row["scores"]["S"] == score(row["accuracy"], whole)


def _run(*arguments: str) -> dict:
    made = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert made.exit_code == 0, made.output
    return json.loads(made.stdout)


def test_commands(finished: Path, copy_of, tmp_path: Path) -> None:
    folder = copy_of(finished / "checkpoint")
    found = _run("eval", str(folder), "--domain", "digits", "--split", "val")
    assert list(found["accuracy"]) == ["digits"]
    assert found["split"] == "val"
    about = _run("info", str(folder))
    assert {row["domain"] for row in about["domains"]} == {"digits", "glyphs", "shapes"}
    assert about["cost"]["params"] > 0
    pruned = _run("prune", str(folder), "--out", str(tmp_path / "pruned"))
    assert pruned["after"]["weights"] < pruned["before"]["weights"]
    assert pruned["flops"] == 2 * round(pruned["after"]["flop"] * pruned["after"]["backbone_macs"])
    assert _run("eval", str(tmp_path / "pruned"), "-d", "digits", "--split", "val") == found
    (tmp_path / "a.json").write_text(json.dumps({"aircraft": 60.34, "svhn": 96.55}))
    scores = _run("scores", str(tmp_path / "a.json"), "--flop", "0.5")
    assert (scores["S_O_partial"], scores["coverage"]) == (1000, "2 of 10 domains")
    assert "S" not in scores
    assert _run("add-domain", str(folder), "signs", "-s", "epochs=1", "-s", "batch=16")["kept"] <= 0.5
    assert "report.md" in _run("report", str(finished), "--out", str(tmp_path / "report"))["report"]


def test_train_command_with_a_file_and_overrides(tiny: Config, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tiny.replace(epochs=1, domains=["digits", "signs"]).as_dict()))
    weights = _run("pretrain", "-c", str(path), "-o", str(tmp_path / "source"), "-s", "pretrain_epochs=1")
    assert weights["source"] == "digits"
    made = _run(
        "train", "-c", str(path), "-o", str(tmp_path / "run"), "-s", "beta=0.25", "-s", f"weights={weights['weights']}"
    )
    assert made["beta"] == 0.25
    resolved = load_config(tmp_path / "run" / "config.yaml")
    assert (resolved.budget.beta, resolved.model.weights, resolved.schedule.epochs) == (0.25, weights["weights"], 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["train", "-o", "{}", "-s", "beta=2"],
            "bap: Config(): expected `budget.beta` to be less than or equal to 1, got 2. (From -s budget.beta.)",
        ),
        (
            ["train", "-o", "{}", "-s", "betta=1"],
            "got 'betta'. Hint: beta? (From -s betta.)",
        ),
        (
            ["train", "-o", "{}", "-s", "epochs"],
            "bap: load_config(): expected overrides like name=value, got 'epochs'.",
        ),
        (
            ["train", "-o", "{}", "-s", "epochs=x"],
            "bap: Config(): expected `schedule.epochs` to be a valid integer, got 'x'. (From -s schedule.epochs.)",
        ),
        (["train", "-o", "{}", "-c", "{}/no.yaml"], "bap: load_config(): expected `path` to be a YAML file"),
        (
            ["train", "-o", "{}", "-s", "data=decathlon"],
            "expected `data.root`, the folder of 'decathlon'",
        ),
        (["eval", "{}/none"], "bap: read_json(): expected {}/none/config.json to be a JSON file"),
        (["report", "{}", "-o", "{}/r"], "bap: read_json(): expected {}/results.json to be a JSON file"),
    ],
)
def test_failures_exit_with_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    filled = [one.replace("{}", str(tmp_path)) for one in arguments]
    monkeypatch.setattr("sys.argv", ["bap", *filled])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message.replace("{}", str(tmp_path)) in error
    assert error.count("\n") <= 2


def test_estimate_multiplies_what_it_measured(tiny: Config) -> None:
    config = tiny.replace(data="decathlon", root="nowhere", domains=[], size=32, batch=8, epochs=3)
    made = estimate(config, steps=2, images={"dtd": (47, 100), "svhn": (10, 50)})
    assert made["steps"] == 3 * (12 + 6)
    assert made["hours"] == pytest.approx(made["steps"] * made["seconds_per_step"] / 3600)
    assert made["peak_bytes"] > 10**7
    with pytest.raises(ValueError, match="expected `images` for 'builtin', got None"):
        estimate(tiny)


def test_demo_tells_the_whole_story(tmp_path: Path) -> None:
    small = [
        "images=100",
        "epochs=2",
        "pretrain_epochs=1",
        "model_options={widths: [8, 8, 16], blocks: [1, 1, 1]}",
        "lr_switch=5e-3",
        "multiplier_rate=1",
    ]
    said: list[str] = []
    made = run_demo(tmp_path, small, said.append)
    assert made["accuracy_after_pruning"] == pytest.approx(made["accuracy"], abs=2.1)
    assert made["params"]["after"] < made["params"]["before"]
    assert made["bytes"]["pruned"] < made["bytes"]["model"] + 20_000
    assert "![channels](kept.png)" in Path(made["report"]).read_text()
    assert any("pruned:" in line for line in said)
    assert made["served"]["bytes"]["after"] < made["served"]["bytes"]["before"]
    assert "## Time and memory as it is served" in Path(made["report"]).read_text()


def test_every_command_has_help() -> None:
    names = [
        "pretrain",
        "train",
        "prune",
        "speed",
        "eval",
        "add-domain",
        "info",
        "scores",
        "report",
        "study",
        "estimate",
        "demo",
    ]
    for name in names:
        made = CliRunner().invoke(app, [name, "--help"])
        assert made.exit_code == 0
        assert "Usage" in made.output
    assert SwitchBank.__doc__
