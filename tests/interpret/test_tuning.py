"""Tuning on request: measured once, kept on disk, taken by later runs; results stay right."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import bap_kernels as bk
from bap_kernels import reference
from bap_kernels.testing import Case, assert_close, make_tensors, run

BASE = Case(in_channels=18, out_channels=20, size=(4, 5), batch=1)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Instead of the other tests' override: a table of two small tiles, and a folder of the test's own."""
    from bap_kernels.triton import configs, tuning

    small = {"large": configs.Config(32, 16, 16, 4, 2), "thin": configs.Config(16, 16, 16, 4, 2)}
    monkeypatch.setattr(configs, "TABLE", dict.fromkeys(configs.TABLE, small))
    monkeypatch.setattr(configs, "tuned", {})
    monkeypatch.setattr(tuning, "settings", bk.settings.read_environment({"BAP_KERNELS_CACHE_DIR": str(tmp_path)}))
    configs.from_table.cache_clear()
    tuning.load.cache_clear()
    yield
    configs.from_table.cache_clear()
    tuning.load.cache_clear()


def layer(case: Case = BASE) -> bk.nn.GatheredConv2d:
    conv = torch.nn.Conv2d(case.in_channels, case.out_channels, 3, padding=1)
    return bk.nn.GatheredConv2d.from_conv2d(conv, bk.ChannelLists(range(0, case.in_channels, 2)))


def test_tune_measures_each_case_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from bap_kernels.triton import configs, tuning

    model, x = layer().eval(), torch.randn(1, 18, 4, 5)
    found = bk.tune(model, x)
    assert [case.problem.kernel for case in found] == ["fwd"]
    assert found[0].config in tuning.candidates("ieee", 80)
    assert found[0].seconds <= found[0].table_seconds
    assert bk.tune(model, x) == []
    with torch.no_grad():
        expected = torch.nn.functional.conv2d(x[:, ::2].double(), model.weight[:, ::2].double(), padding=1)
        with bk.use_backend("triton"):
            y = model(x)
    assert_close(y, expected + model.bias.double().view(1, -1, 1, 1), torch.float32, 81)
    # Another process finds the file.
    (file,) = tmp_path.iterdir()
    assert file == tuning.file_of(CPU)
    kept = dict(configs.tuned)
    monkeypatch.setattr(configs, "tuned", {})
    tuning.load.cache_clear()
    assert bk.tune(model, x) == []
    assert configs.tuned == kept != {}


def test_the_fastest_is_kept_and_a_tie_is_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    from bap_kernels.triton import configs, tuning

    other, table = tuning.candidates("ieee", 80)
    for times, wanted in (((1.0, 0.5), other), ((0.5, 1.0), table), ((1.0, 0.99), table)):
        monkeypatch.setattr(configs, "tuned", {})
        given = iter(times)
        monkeypatch.setattr(tuning, "_seconds", lambda run, device, given=given: next(given))
        (case,) = bk.tune(layer().eval(), torch.randn(1, 18, 4, 5))
        assert case.config == wanted
        assert case.table_seconds == times[0]


def test_gradients_are_tuned_too_and_stay_right() -> None:
    model = layer()
    found = bk.tune(model, torch.randn(1, 18, 4, 5, requires_grad=True), backward=True)
    # The input is a leaf that no gradient is asked of.
    assert [case.problem.kernel for case in found] == ["fwd", "wgrad"]
    assert model.weight.grad is None
    sample = make_tensors(BASE)
    sample.input.requires_grad_()
    from bap_kernels.triton.tuning import tuning

    with bk.use_backend("triton"), tuning() as log:
        y = torch.ops.bap_kernels.gathered_conv2d(*sample.args)
        (dx,) = torch.autograd.grad(y, sample.input, torch.ones_like(y))
    assert {case.problem.kernel for case in log} == {"fwd", "dgrad"}
    expected = reference.gathered_conv2d_backward(torch.ones(y.shape), *sample.args[:2], *sample.args[3:])[0]
    assert_close(dx, expected, torch.float32, 180)


def test_switches_are_tuned() -> None:
    from bap_kernels.triton.tuning import tuning

    switch = torch.tensor([1.0, 0.0] * 9, requires_grad=True)
    x, weight = torch.randn(1, 18, 4, 5), torch.randn(20, 18, 3, 3)
    with bk.use_backend("triton"), tuning() as log:
        bk.switched_conv2d(x, weight, None, switch, padding=1).sum().backward()
    assert [case.problem.kernel for case in log] == ["fwd", "dgrad reduced"]
    expected = (torch.nn.grad.conv2d_input(x.shape, weight, torch.ones(1, 20, 4, 5), padding=1) * x).sum((0, 2, 3))
    torch.testing.assert_close(switch.grad, expected, rtol=1e-4, atol=1e-4)


def test_configurations_that_do_not_fit_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.errors import OutOfResources

    from bap_kernels.triton import tuning

    _, table = tuning.candidates("ieee", 80)
    calls = []

    def seconds(run: object, device: torch.device) -> float:
        calls.append(run)
        if len(calls) == 2:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return 1.0

    monkeypatch.setattr(tuning, "_seconds", seconds)
    (case,) = bk.tune(layer().eval(), torch.randn(1, 18, 4, 5))
    assert case.config == table
    assert len(calls) == 2


@pytest.mark.parametrize("text", ["", "{", '{"a": 1}', "[1]", '[{"problem": {}}]', '[{"problem": {}, "config": {}}]'])
def test_damaged_files_count_as_none(text: str) -> None:
    from bap_kernels.triton import configs, tuning

    file = tuning.file_of(CPU)
    assert file is not None
    file.write_text(text)
    tuning.load(CPU)
    assert configs.tuned == {}
    assert len(bk.tune(layer().eval(), torch.randn(1, 18, 4, 5))) == 1
    assert len(json.loads(file.read_text())) == 1


def test_nothing_is_measured_unasked() -> None:
    from bap_kernels.triton import configs

    run(make_tensors(BASE), "triton")
    assert configs.tuned == {}


def test_the_environment_asks_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from bap_kernels.triton import configs, tuning

    asked = {"BAP_KERNELS_CACHE_DIR": "", "BAP_KERNELS_AUTOTUNE": "1"}
    monkeypatch.setattr(tuning, "settings", bk.settings.read_environment(asked))
    run(make_tensors(BASE), "triton")
    assert len(configs.tuned) == 1
    assert tuning.file_of(CPU) is None
