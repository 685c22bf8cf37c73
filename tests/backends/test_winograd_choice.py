"""Winograd convolutions as candidates of ``auto``, the setting that allows them, and the rule of training."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import bap_kernels as bk
from bap_kernels import _C
from bap_kernels.settings import read_environment

native = pytest.mark.skipif(bool(_C.unsupported_reason("native")), reason=str(_C.unsupported_reason("native")))


@pytest.fixture
def allowed() -> Iterator[None]:
    bk.clear_choices()
    with bk.use_winograd(True), bk.use_backend("auto"):
        yield
    bk.clear_choices()


def small() -> tuple[Tensor, Tensor]:
    return torch.randn(1, 32, 12, 12), torch.randn(32, 32, 3, 3)


def candidates() -> set[str]:
    return {name for choice in bk.choices() for name in choice["candidates"]}


@native
@pytest.mark.usefixtures("allowed")
def test_auto_weighs_winograd() -> None:
    x, weight = small()
    y = bk.gathered_conv2d(x, weight, padding=1)
    assert {"native", "winograd4"} <= candidates()
    assert not any("no-winograd" in choice["case"] for choice in bk.choices())
    expected = torch.nn.functional.conv2d(x.double(), weight.double(), padding=1)
    assert (y.double() - expected).abs().max() < 1e-5 * expected.abs().max()


@native
@pytest.mark.usefixtures("allowed")
def test_cases_without_winograd_are_their_own() -> None:
    x, weight = small()
    with bk.use_winograd(False):
        bk.gathered_conv2d(x, weight, padding=1)
    assert not any(name.startswith("winograd") for name in candidates())
    bk.gathered_conv2d(x, weight, padding=1)
    cases = {choice["case"] for choice in bk.choices()}
    assert len(cases) == 2
    assert sum("no-winograd" in case for case in cases) == 1


@native
@pytest.mark.usefixtures("allowed")
@pytest.mark.parametrize(
    "change",
    [
        {"stride": 2},
        {"dilation": 2},
        {"dtype": torch.bfloat16},
        {"channels": 4},
        {"kernel": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_auto_weighs_no_winograd_for(change: dict) -> None:
    channels, kernel, dtype = change.pop("channels", 32), change.pop("kernel", 3), change.pop("dtype", torch.float32)
    x, weight = torch.randn(1, channels, 12, 12).to(dtype), torch.randn(32, channels, kernel, kernel).to(dtype)
    bk.gathered_conv2d(x, weight, padding=1, **change)
    assert candidates()
    assert not any(name.startswith("winograd") for name in candidates())


@native
def test_named_backend_stays_direct() -> None:
    x, weight = torch.randn(4, 32, 24, 24), torch.randn(32, 32, 3, 3)
    with bk.use_backend("native"):
        with bk.use_winograd(False):
            expected = bk.gathered_conv2d(x, weight, padding=1)
        with bk.use_winograd(True):
            assert torch.equal(bk.gathered_conv2d(x, weight, padding=1), expected)


def test_use_winograd_nests_and_restores_after_errors() -> None:
    before = _C.get_winograd()
    with bk.use_winograd(True) as outer:
        assert repr(outer) == "use_winograd(True)"
        with bk.use_winograd(False):
            assert not _C.get_winograd()
        assert _C.get_winograd()
        with pytest.raises(KeyError), bk.use_winograd(False):
            raise KeyError
        assert _C.get_winograd()
    assert _C.get_winograd() == before


def test_use_winograd_call_sets_it() -> None:
    before = _C.get_winograd()
    bk.use_winograd(not before)
    try:
        assert _C.get_winograd() != before
    finally:
        bk.use_winograd(before)


@pytest.mark.parametrize("value", [1, "on", None])
def test_use_winograd_refuses(value: object) -> None:
    with pytest.raises(TypeError, match=r"use_winograd\(\): expected `allowed` to be a bool, got "):
        bk.use_winograd(value)  # type: ignore[arg-type]


def test_force_winograd_refuses_other_sizes() -> None:
    with pytest.raises(ValueError, match=r"force_winograd\(\): expected `size` to be 0, 2 or 4, got 3"):
        _C.force_winograd(3)


def test_setting_belongs_to_its_thread() -> None:
    default = read_environment().winograd
    seen = []
    with bk.use_winograd(not default):
        thread = threading.Thread(target=lambda: seen.append(_C.get_winograd()))
        thread.start()
        thread.join()
    assert seen == [default]


def test_environment_is_parsed() -> None:
    assert read_environment({}).winograd
    assert read_environment({"BAP_KERNELS_WINOGRAD": "1"}).winograd
    assert not read_environment({"BAP_KERNELS_WINOGRAD": "0"}).winograd
    with pytest.raises(ValueError, match="expected `BAP_KERNELS_WINOGRAD` to be one of 0, 1, got 'no'"):
        read_environment({"BAP_KERNELS_WINOGRAD": "no"})


@pytest.mark.parametrize("value", ["0", "1"])
def test_environment_is_the_default(value: str) -> None:
    code = (
        "import threading, bap_kernels as bk\n"
        "from bap_kernels import _C\n"
        "seen = [_C.get_winograd()]\n"
        "t = threading.Thread(target=lambda: seen.append(_C.get_winograd())); t.start(); t.join()\n"
        f"assert seen == [{value == '1'}] * 2, seen"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"BAP_KERNELS_WINOGRAD": value}, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(24, 48, 3, padding=1), nn.Conv2d(48, 24, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = model(x)
    return [y.detach(), *torch.autograd.grad(y.square().mean(), [x, *model.parameters()], materialize_grads=True)]


@native
@pytest.mark.usefixtures("allowed")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_training_of_switches_by_winograd(layout: torch.memory_format) -> None:
    model = bk.nn.switch_(Small(), ["a", "b"])
    bk.set_domain(model, "a")
    x = torch.randn(4, 24, 20, 20).contiguous(memory_format=layout)
    winograd = step(model, x)
    with bk.use_winograd(False):
        direct = step(model, x)
    assert not torch.equal(winograd[0], direct[0]), "this was the direct convolution"
    for got, want in zip(winograd, direct, strict=True):
        assert (got - want).abs().max() <= 1e-4 * want.abs().max() + 1e-12


@native
@pytest.mark.usefixtures("allowed")
def test_backward_uses_the_setting_of_its_forward() -> None:
    x, weight = torch.randn(4, 32, 20, 20, requires_grad=True), torch.randn(32, 32, 3, 3)
    grad = torch.randn(4, 32, 20, 20)

    def gradient(forward: bool, backward: bool) -> Tensor:
        with bk.use_winograd(forward):
            y = bk.gathered_conv2d(x, weight, padding=1)
        with bk.use_winograd(backward):
            return torch.autograd.grad(y, x, grad)[0]

    direct, winograd = gradient(False, False), gradient(True, True)
    assert not torch.equal(direct, winograd)
    assert torch.equal(gradient(False, True), direct)
    assert torch.equal(gradient(True, False), winograd)


@native
@pytest.mark.usefixtures("allowed")
def test_report_says_that_more_than_the_roofline_is_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    model = bk.swap_(nn.Sequential(nn.Conv2d(32, 32, 3, padding=1))).eval()
    explain = _C.explain

    def winograd(*args: object) -> dict:
        return explain(*args) | {"backend": "winograd4", "candidates": {"native": 2.0, "winograd4": 1.0}}

    monkeypatch.setattr(_C, "explain", winograd)
    with torch.no_grad():
        (layer,) = bk.report(model, torch.randn(1, 32, 12, 12)).layers
    assert layer.backend == "winograd4"
    assert "winograd4 1" in layer.why
    assert "more than 100% is possible" in layer.why
