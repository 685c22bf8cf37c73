"""Files for other runtimes: they compute what the plan does, and a wrong one is found."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bap.cli.commands import app
from bap.config import Config
from bap.export import FORMATS, export_domain, formats, network, unavailable_reason
from bap.prune.deploy import deploy
from bap.train.checkpoint import save_checkpoint
from torch import nn
from typer.testing import CliRunner

import bap_kernels as bk
from tests.bap.prune.test_deploy import _trained

CONFIG = Config(model_options={"widths": [8, 16, 16], "blocks": [1, 1, 1]})
X = torch.zeros(2, 3, 32, 32)


@pytest.fixture(scope="module")
def narrow() -> nn.Module:
    return deploy(_trained(CONFIG), X).model


@pytest.mark.parametrize(
    "name", [name if name != "aoti" else pytest.param(name, marks=pytest.mark.slow) for name in FORMATS]
)
def test_files_give_the_plans_outputs(narrow: nn.Module, tmp_path: Path, name: str) -> None:
    if reason := unavailable_reason(FORMATS[name]):
        pytest.skip(reason)
    # AOTInductor compiles C++ for each domain.
    domains = ("b",) if name == "aoti" else ("a", "b")
    rows = [export_domain(narrow, domain, X, tmp_path, [name], rounds=1)[0] for domain in domains]
    for row in rows:
        assert 0 < row.change < 1e-4
        assert row.milliseconds > 0 < row.plan_milliseconds
        files = [file for file in tmp_path.iterdir() if file.name.startswith(f"{row.domain}.")]
        assert row.bytes == sum(file.stat().st_size for file in files) > 1000
    # The file stands for itself, and takes inputs of its shape.
    x = torch.randn(X.shape)
    run = FORMATS[name].load(Path(rows[-1].file), torch.get_num_threads())
    bk.set_domain(narrow, "b")
    with torch.inference_mode():
        torch.testing.assert_close(run(x), narrow(x), rtol=1e-3, atol=1e-4)
        first, second = run(x), run(-x)
        assert not torch.equal(first, second)


def test_a_file_that_computes_something_else_is_an_error(
    narrow: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = FORMATS["pt2"].write

    def wrong(small: nn.Module, example: torch.Tensor, path: Path) -> None:
        write(nn.Sequential(small, nn.Threshold(0.1, 0.0)).eval(), example, path)

    monkeypatch.setitem(FORMATS, "pt2", replace(FORMATS["pt2"], write=wrong))
    with pytest.raises(
        network.ExportError, match=r"expected .*a\.pt2 to give the plan's outputs within 0\.0001, got a"
    ):
        export_domain(narrow, "a", X, tmp_path, ["pt2"])


def test_what_cannot_be_written_is_refused_before_anything_is(
    narrow: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"expected `formats` to name only onnx, .*executorch, got 'tflite'"):
        export_domain(narrow, "a", X, tmp_path / "out", ["pt2", "tflite"])
    monkeypatch.setattr(formats.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"the packages of format 'executorch', got: executorch not installed \(`pip"):
        export_domain(narrow, "a", X, tmp_path / "out", ["pt2", "executorch"])
    assert not (tmp_path / "out").exists()


def test_command_writes_every_domain(tmp_path: Path) -> None:
    save_checkpoint(
        tmp_path / "net",
        _trained(CONFIG),
        CONFIG,
        specs := {
            name: {"classes": [str(number) for number in range(count)], "size": 32}
            for name, count in (("a", 3), ("b", 4))
        },
    )
    arguments = ["export", str(tmp_path / "net"), "-o", str(tmp_path / "out"), "-f", "pt2", "--rounds", "1"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["files"]
    assert [row["domain"] for row in rows] == list(specs)
    assert all(Path(row["file"]).is_file() for row in rows)


def test_one_program_stores_equal_tensors_once(narrow: nn.Module) -> None:
    if reason := unavailable_reason(FORMATS["executorch"]):
        pytest.skip(reason)
    networks = {name: bk.specialize(narrow, name, X) for name in ("a", "b")}
    own = {name: len(formats.executorch_program({"forward": network}, X)) for name, network in networks.items()}
    twice = len(formats.executorch_program({"a": networks["a"], "b": networks["a"]}, X))
    assert own["a"] < twice < 1.3 * own["a"]
    assert len(formats.executorch_program(networks, X)) > 1.3 * max(own.values())
