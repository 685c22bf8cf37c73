"""Specialised networks equal the masked dense network, and consist of PyTorch's layers alone."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import bap_kernels as bk
from tests.networks import LARGE, SMALL, Residual, masked_dense, random_network, randomise
from tests.plan.test_planned import assert_equal, swapped


@pytest.mark.parametrize("both", [False, True], ids=["in", "both"])
@pytest.mark.parametrize("network", SMALL)
@torch.no_grad()
def test_small_networks(network: str, both: bool) -> None:
    for density in (1.0, 0.6, 0.2):
        model, masked = swapped(randomise(SMALL[network]()), density, seed=3, both=both)
        x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        small = bk.specialize(model, "a", x)
        assert_equal(small(x), masked(x))
        assert not any(type(module).__module__.startswith("bap_kernels") for module in small.modules())
        assert "bap_kernels" not in small.code


@pytest.mark.parametrize("chunk", range(2))
@torch.no_grad()
def test_random_networks(chunk: int) -> None:
    for seed in range(30 * chunk, 30 * chunk + 30):
        model, masked = swapped(randomise(random_network(seed), seed), (0.3, 0.6, 1.0)[seed % 3], seed, seed % 2 == 1)
        x = torch.randn(2, 3, 7, 9, generator=torch.Generator().manual_seed(seed))
        try:
            assert_equal(bk.specialize(model, "a", x)(x), masked(x))
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {model}") from error


@pytest.mark.parametrize("network", LARGE)
@torch.no_grad()
def test_known_networks(network: str) -> None:
    model, masked = swapped(randomise(LARGE[network]()), 0.5, 1)
    before = copy.deepcopy(model.state_dict())
    small = bk.specialize(model, "a")
    x = torch.randn(2, 3, 64, 64)
    assert_equal(small(x), masked(x))
    parameters = [sum(p.numel() for p in one.parameters() if p.dim() == 4) for one in (small, model)]
    assert parameters[0] < 0.65 * parameters[1]
    small.load_state_dict({name: torch.zeros_like(value) for name, value in small.state_dict().items()})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@torch.no_grad()
def test_layers_keep_their_names() -> None:
    model, _ = swapped(randomise(Residual()), 0.5, 0)
    small = bk.specialize(model, "a", torch.randn(1, 3, 16, 16))
    assert isinstance(small.get_submodule("project.0"), nn.Conv2d)
    assert small.get_submodule("c").weight.shape == (9, 10, 3, 3)
    assert type(small.get_submodule("na")) is nn.BatchNorm2d


def test_export() -> None:
    model, masked = swapped(randomise(Residual()), 0.5, 0)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        small = bk.specialize(model, "a", x)
        program = torch.export.export(small, (x,))
        assert_equal(program.module()(x), masked(x))


@pytest.mark.parametrize("network", ["residual", "dense", "inverted", "resnet18"])
def test_onnx(network: str) -> None:
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    model, masked = swapped(randomise((SMALL | LARGE)[network]()), 0.5, 0)
    x = torch.randn(2, 3, 32, 32)
    small = bk.specialize(model, "a", x)
    file = io.BytesIO()
    torch.onnx.export(small, (x,), file, input_names=["x"], output_names=["y"], dynamo=False, opset_version=17)
    session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (y,) = session.run(["y"], {"x": x.numpy()})
    with torch.no_grad():
        expected = masked(x).numpy()
    assert np.abs(y - expected).max() <= 2e-5 * np.abs(expected).max()


@torch.no_grad()
def test_an_example_is_found_where_none_is_given() -> None:
    model, masked = swapped(randomise(Residual()), 0.5, 0)
    x = torch.randn(2, 3, 16, 16)
    assert_equal(bk.specialize(model, "a")(x), masked(x))


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"specialize\(\): expected `model` to have convolutions, got none"):
        bk.specialize(nn.Linear(3, 3).eval())
    picky = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4 * 77, 3)).eval()
    with pytest.raises(ValueError, match=r"specialize\(\): expected `model` to take one image, got an error on every"):
        bk.specialize(picky)
    model, _ = swapped(randomise(Residual()), 0.5, 0)
    with pytest.raises(ValueError, match=r"specialize\(\): expected `domain` to be one of \['a', 'b'\], got 'c'"):
        bk.specialize(model, "c")
    with pytest.raises(ValueError, match=r"specialize\(\): expected `model` to be in eval mode"):
        bk.specialize(model.train(), "a")


@pytest.mark.slow
def test_aot_inductor(tmp_path: Path) -> None:
    model, masked = swapped(randomise(Residual()), 0.5, 0)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        program = torch.export.export(bk.specialize(model, "a", x), (x,))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "small.pt2"))
        loaded = torch._inductor.aoti_load_package(package)
        assert_equal(loaded(x), masked(x))


def test_switched_models_need_no_example() -> None:
    torch.manual_seed(0)
    model = bk.nn.switch_(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)), ["a", "b"]).eval()
    with torch.no_grad():
        model[2].domains["b"].score[::2] = 0
    bk.set_domain(model, "b")
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(bk.specialize(model, "b")(x), model(x))


ROUNDED = [(network, both) for network in sorted(SMALL) for both in (False, True)]
ROUNDED += [(network, True) for network in ("resnet50", "densenet121", "mobilenet_v2")]


@pytest.mark.parametrize(("network", "both"), ROUNDED)
@torch.no_grad()
def test_rounded_channels(network: str, both: bool) -> None:
    make = {**SMALL, **LARGE}[network]
    size = 64 if network in LARGE else 16
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    dense = randomise(make())
    model = bk.swap_(copy.deepcopy(dense), layer_type=bk.nn.MaskedConv2d if both else bk.nn.GatheredConv2d)
    table = bk.ChannelTable.random(model, ["a"], 0.5, 1, both, exact=False)
    masked = masked_dense(dense, table, "a")
    bk.attach_(model, table)
    small, exact = (bk.specialize(model, "a", x, round_to=round_to) for round_to in (8, 1))
    assert_equal(small(x), masked(x), 1e-4)
    assert_equal(small(x[:1]), masked(x[:1]), 1e-4)
    whole = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    rounded = 0
    for name, conv in small.named_modules():
        full = whole.get(name)
        if not isinstance(conv, nn.Conv2d) or full is None or 1 < full.groups < full.in_channels:
            continue
        assert conv.out_channels % 8 == 0 or conv.out_channels == full.out_channels, name
        assert conv.in_channels % 8 == 0 or conv.in_channels == full.in_channels, name
        known = exact.get_submodule(name)
        rounded += (conv.in_channels, conv.out_channels) != (known.in_channels, known.out_channels)
    assert rounded > 0


def test_rounding_to_less_than_one_raises() -> None:
    model = bk.swap_(nn.Sequential(nn.Conv2d(3, 8, 1)).eval())
    with pytest.raises(ValueError, match=r"specialize\(\): expected `round_to` to be at least 1, got 0"):
        bk.specialize(model, round_to=0)
