"""A budget in milliseconds, from layers measured on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bap.config import Config
from bap.data import Domain
from bap.files import read_json, write_json
from bap.prune.layers import SwitchBank
from bap.results.run import train_run
from bap.train.layer_times import measure_layers
from bap.train.network import switched_network

import bap_kernels as bk


def test_layers_are_measured(tiny: Config) -> None:
    wide = tiny.replace(model_options={"widths": [8, 64, 64], "blocks": [1, 1, 1]})
    model = switched_network(wide, {"a": 3}).train()
    bk.set_domain(model, "a")
    with bk.use_backend("aten"):
        times = measure_layers(model, torch.zeros(8, 3, 64, 64), rounds=5)
    assert list(times.per_channel) == SwitchBank(model).names
    assert all(value > 0 for value in times.per_channel.values())
    assert times.fixed >= 0
    assert model.training
    with pytest.raises(ValueError, match="to have switches that `example` reaches"):
        measure_layers(torch.nn.Conv2d(3, 3, 3), torch.zeros(1, 3, 8, 8))


def test_a_budget_in_milliseconds_holds(tiny: Config, suite: dict[str, Domain], tmp_path: Path) -> None:
    config = tiny.replace(epochs=1, measure="time", domains=["digits", "glyphs"])
    data = {name: suite[name] for name in config.data.domains}
    train_run(config, tmp_path / "share", domains=data)
    times = read_json(tmp_path / "share" / "layer_times.json")
    model = switched_network(config, {name: len(one.classes) for name, one in data.items()})
    sizes = dict(zip(SwitchBank(model).names, SwitchBank(model).sizes, strict=True))
    total = sum(times["per_channel"][name] * size for name, size in sizes.items())
    budget = times["fixed"] + 0.4 * total
    # As a resumed run does, this one takes the times that were measured before.
    write_json(tmp_path / "ms" / "layer_times.json", times)
    results = train_run(config.replace(budget_ms=budget), tmp_path / "ms", resume=True, domains=data)
    assert read_json(tmp_path / "ms" / "layer_times.json") == times
    assert results["beta"] == pytest.approx(0.4)
    costs = {name: times["per_channel"][name] * size for name, size in sizes.items()}
    for kept in results["kept"].values():
        assert times["fixed"] + kept * sum(costs.values()) <= budget * (1 + 1e-9)
    with pytest.raises(ValueError, match=r"`budget.milliseconds` to be above"):
        train_run(config.replace(budget_ms=1e-9), None, domains=data)
    with pytest.raises(ValueError, match=r"`budget.measure` to be 'time' for `budget.milliseconds`, got 'mac'"):
        config.replace(measure="mac", budget_ms=1.0)
