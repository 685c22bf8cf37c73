"""The narrow network that is served: its answers, its size, and the table of its times."""

from __future__ import annotations

import json

import pytest
import torch
from bap.cli.commands import app
from bap.config import Config
from bap.prune.deploy import compare_times, deploy, speed_report, tensor_bytes
from bap.prune.layers import SwitchBank
from bap.prune.prune import PruneError
from bap.results.report import speed_table
from bap.train.checkpoint import save_checkpoint
from bap.train.network import switched_network
from torch import nn
from typer.testing import CliRunner

import bap_kernels as bk


def _trained(config: Config, names: tuple[str, ...] = ("a", "b")) -> nn.Module:
    """A network whose domains keep overlapping thirds of the channels, with batch norms that differ."""
    torch.manual_seed(0)
    model = switched_network(config, {name: 3 + number for number, name in enumerate(names)}).eval()
    bank = SwitchBank(model)
    common = torch.rand(sum(bank.sizes))
    for name in names:
        bank.write(name, 1e-2 * (common + 0.3 * torch.rand(sum(bank.sizes)) > 0.75).float())
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    return model


@pytest.mark.parametrize(
    ("name", "options"),
    [("resnet26", {"widths": [8, 16, 16], "blocks": [1, 2, 1]}), ("wrn28_4", {"depth": 10, "widen": 1})],
)
def test_outputs_of_every_domain_stay_with_fewer_weights(name: str, options: dict) -> None:
    model = _trained(Config(model=name, model_options=options))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    made = deploy(model, torch.zeros(1, 3, 32, 32))
    assert made.bytes < 0.9 * tensor_bytes(model)
    assert any(new < old for old, new in made.report.layers.values())
    x = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        for domain in ("a", "b"):
            for one in (model, made.model, made.planned):
                bk.set_domain(one, domain)
            expected = model(x)
            torch.testing.assert_close(made.model(x), expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(made.planned(x), expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_deploy_detects_changed_outputs(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    prune = bk.prune_unused_

    def wrong(model: nn.Module, example: torch.Tensor) -> bk.PruneReport:
        made = prune(model, example)
        with torch.no_grad():
            next(one for one in model.modules() if isinstance(one, nn.Conv2d)).weight.mul_(2)
        return made

    monkeypatch.setattr("bap_kernels.prune_unused_", wrong)
    with pytest.raises(PruneError, match=r"deploy\(\): expected the outputs .* within 0.0001, got .* for 'a'"):
        deploy(_trained(tiny), torch.zeros(1, 3, 32, 32))


def test_times_compare_the_same_function(tiny: Config) -> None:
    model = _trained(tiny)
    example = torch.zeros(2, 3, 32, 32)
    made = deploy(model, example)
    specs = speed_report(model, made, example, rounds=3)
    assert [row["domain"] for row in specs["domains"]] == ["a", "b"]
    for row in specs["domains"]:
        assert row["over dense"] == pytest.approx(row["dense ms"] / row["planned ms"])
        assert row["over masked"] == pytest.approx(row["masked ms"] / row["planned ms"])
    assert specs["bytes"]["after"] < specs["bytes"]["before"]
    text = speed_table(specs)
    assert text.splitlines()[0] == "| domain | dense ms | masked ms | planned ms | over dense | over masked |"
    assert f"{specs['parameters']['after']:,} parameters instead of" in text


def test_masked_baseline_equals_the_model(tiny: Config) -> None:
    from bap.prune.deploy import _stock

    model = _trained(tiny)
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        bk.set_domain(model, "b")
        torch.testing.assert_close(_stock(model, "b", masked=True)(x), model(x), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(_stock(model, "b", masked=False)(x), model(x), rtol=1e-2, atol=1e-2)
    assert len(compare_times(model, deploy(model, x), x, rounds=1)) == 2


def test_command(tiny: Config, tmp_path) -> None:
    model = _trained(tiny)
    specs = {name: {"classes": [str(one) for one in range(n)], "size": 32} for name, n in (("a", 3), ("b", 4))}
    save_checkpoint(tmp_path, model, tiny, specs)
    made = CliRunner().invoke(app, ["speed", str(tmp_path), "--batch", "2", "--rounds", "2"], catch_exceptions=False)
    assert made.exit_code == 0, made.output
    found = json.loads(made.stdout)
    assert found["batch"] == 2
    assert found["largest_change"] < 1e-4
