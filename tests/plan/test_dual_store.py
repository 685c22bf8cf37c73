"""Plans in which a convolution stores what the next one reads a second time: when, and that nothing else changes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

import bap_kernels as bk
from bap_kernels._load import _C
from bap_kernels.plan import dual_store
from bap_kernels.plan.conv_steps import ConvStep
from bap_kernels.plan.dual_store import dual_store_pays
from bap_kernels.plan.planned import PlannedNetwork
from bap_kernels.plan.steps import Step
from tests.networks import LARGE, SMALL, PreActivation, Residual, masked_dense, random_network, randomise

LAST, PLANES = torch.channels_last, torch.contiguous_format
STREAMS = ("residual", "preactivation", "option_a", "inverted")


@pytest.fixture(autouse=True)
def _one_backend() -> None:
    with bk.use_backend("aten" if _C.unsupported_reason("native") else "native"):
        yield


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every reader of some stored channels gets a copy, as no backend that runs here would want it."""
    monkeypatch.setattr(dual_store, "dual_store_pays", lambda *arguments: True)


def swapped(model: nn.Module, density: float, seed: int) -> tuple[nn.Module, nn.Module]:
    dense = copy.deepcopy(model)
    table = bk.ChannelTable.random(bk.swap_(model), ["a", "b"], density, seed)
    bk.attach_(model, table)
    return model, masked_dense(dense, table, "a")


def twice(steps: list[Step]) -> list[ConvStep]:
    return [step for step in steps if isinstance(step, ConvStep) and step.dual_store is not None]


def check(model: nn.Module, density: float, seed: int, x: torch.Tensor, layout: torch.memory_format) -> int:
    """Asserts that the plan equals the masked network; the number of copies in it."""
    model, masked = swapped(model, density, seed)
    planned = bk.plan(model, x, "a", memory_format=layout)
    expected = masked(x)
    assert (planned(x) - expected).abs().max() <= 2e-5 * expected.abs().max()
    steps = planned._program.steps
    for producer in twice(steps):
        (reader,) = [step for step in steps if producer.dual_store in step.reads]
        assert isinstance(reader, ConvStep)
        assert reader.in_index is None
        assert reader.weight_index is not None
        assert reader.weight_index.shape == producer.dual_index.shape
        assert producer.dual_store not in planned._program.freed[steps.index(producer)]
        assert producer.dual_store in planned._program.freed[steps.index(reader)]
    return len(twice(steps))


@pytest.mark.parametrize("layout", [PLANES, LAST], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("network", SMALL)
@torch.no_grad()
def test_small_networks(network: str, layout: torch.memory_format, forced: None) -> None:
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = [
        check(randomise(SMALL[network]()), density, seed, x, layout) for seed, density in enumerate((1.0, 0.6, 0.3))
    ]
    assert found[0] == 0
    assert any(found[1:]) == (network in STREAMS)


@pytest.mark.parametrize("chunk", range(2))
@torch.no_grad()
def test_random_networks(chunk: int, forced: None) -> None:
    count = 0
    for seed in range(25 * chunk, 25 * chunk + 25):
        x = torch.randn(2, 3, 7, 9, generator=torch.Generator().manual_seed(seed))
        model = randomise(random_network(seed), seed)
        try:
            count += check(model, 0.4, seed, x, (PLANES, LAST)[seed // 2 % 2])
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {model}") from error
    assert count >= 3


@torch.no_grad()
def test_resnet50(forced: None) -> None:
    model, masked = swapped(randomise(LARGE["resnet50"]()), 0.5, 2)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    planned = bk.plan(model, x, "a", memory_format=LAST)
    # One for each block but the first of a stage, whose stream two convolutions read.
    assert len(twice(planned._program.steps)) == 12
    assert "stores " in str(planned)
    for name in ("b", "a"):
        bk.set_domain(planned, name)
    expected = masked(x)
    assert (planned(x) - expected).abs().max() <= 2e-5 * expected.abs().max()


@torch.no_grad()
def test_dual_stores_are_held_until_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(copied: bool) -> PlannedNetwork:
        monkeypatch.setattr(dual_store, "dual_store_pays", lambda *arguments: copied)
        model = Stream(nn.Conv2d(4, 8, 1)).eval()
        bk.attach_(bk.swap_(model), {"a": {"inner": bk.ChannelLists([1, 4, 6])}})
        return bk.plan(model, torch.randn(2, 4, 10, 10), "a")

    plain, copied = made(False), made(True)
    assert [len(twice(one._program.steps)) for one in (plain, copied)] == [0, 1]
    # Of 200 pixels of 4 bytes, while the inner convolution runs: the stream, its result and the copy.
    assert plain.peak_bytes() == 800 * (8 + 24)
    assert copied.peak_bytes() == 800 * (8 + 24 + 3)


class Stream(nn.Module):
    """A stream that one convolution reads, and the caller."""

    def __init__(self, stem: nn.Module) -> None:
        super().__init__()
        self.stem, self.inner = stem, nn.Conv2d(8, 24, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.stem(x)
        return x, torch.relu(self.inner(x))


@torch.no_grad()
def test_export_and_compile_see_both_results(forced: None) -> None:
    model, masked = swapped(randomise(Residual()), 0.5, 0)
    x = torch.randn(2, 3, 16, 16)
    planned = bk.plan(model, x, "a")
    assert twice(planned._program.steps)
    expected = masked(x)
    program = torch.export.export(planned, (x,))
    assert "_gathered_conv2d_fused" in str(program.graph)
    assert (program.module()(x) - expected).abs().max() <= 2e-5 * expected.abs().max()


@torch.no_grad()
def test_cpu_backends_get_no_dual_store() -> None:
    model, _ = swapped(randomise(Residual()), 0.5, 0)
    x = torch.randn(2, 3, 16, 16)
    for layout in (PLANES, LAST):
        assert not twice(bk.plan(model, x, "a", memory_format=layout)._program.steps)


HALF = np.arange(0, 64, 2)
# 32 of 64 in whole blocks of 8; 4 of 64, each alone in its sector of 16.
BLOCKS, FEW = np.concatenate([np.arange(8 * b, 8 * b + 8) for b in (0, 3, 4, 6)]), np.array([1, 20, 40, 60])
RULE: dict[str, tuple[Callable[[], bool], bool]] = {
    "copied to be gathered": (lambda: dual_store_pays(HALF, 1, 2, LAST, "triton"), True),
    "the same by the other backend": (lambda: dual_store_pays(HALF, 1, 2, LAST, "cuda"), True),
    "several taps are copied by Triton": (lambda: dual_store_pays(HALF, 9, 2, LAST, "triton"), True),
    "in place, all sectors are read, as many channels": (lambda: dual_store_pays(HALF, 9, 2, LAST, "cuda"), False),
    "in place, few of each sector": (lambda: dual_store_pays(FEW, 9, 2, LAST, "cuda"), True),
    "in place, words of 4 bytes": (lambda: dual_store_pays(HALF, 1, 4, LAST, "triton"), False),
    "in place, words of 4 bytes, few": (lambda: dual_store_pays(FEW, 1, 4, LAST, "triton"), True),
    "blocks": (lambda: dual_store_pays(BLOCKS, 1, 2, LAST, "triton"), False),
    "blocks that are not aligned": (lambda: dual_store_pays(BLOCKS + 1, 1, 2, LAST, "triton"), True),
    "planes": (lambda: dual_store_pays(HALF, 1, 2, PLANES, "triton"), False),
    "cpu": (lambda: dual_store_pays(FEW, 1, 2, LAST, "native"), False),
    "no backend is named": (lambda: dual_store_pays(FEW, 1, 2, LAST, "auto"), False),
}


@pytest.mark.parametrize("name", RULE)
def test_dual_store_pays(name: str) -> None:
    decides, expected = RULE[name]
    assert decides() is expected


def test_dual_stores_hold_values_before_the_consumers_norm(forced: None) -> None:
    model, masked = swapped(randomise(PreActivation()), 0.5, 0)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        planned = bk.plan(model, x, "a")
        expected = masked(x)
        assert (planned(x) - expected).abs().max() <= 2e-5 * expected.abs().max()
    readers = {step.dual_store for step in twice(planned._program.steps)}
    read = [step for step in planned._program.steps if set(step.reads) & readers]
    assert any(step.kind.startswith("norm+relu+conv") for step in read)
