"""Batches that the leading steps of a plan take in chunks."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import bap_kernels as bk
from bap_kernels._load import _C
from bap_kernels.plan.chunks import Chunks, samples_in_chunk
from bap_kernels.plan.planned import PlannedNetwork
from tests.networks import SMALL, masked_dense, randomise

chunks = importlib.import_module("bap_kernels.plan.chunks")
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.fixture(autouse=True)
def _one_backend() -> Iterator[None]:
    with bk.use_backend("aten" if _C.unsupported_reason("native") else "native"):
        yield


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of chunks that batches are cut into, from here on; three samples at a time."""
    used: list[int] = []
    run = Chunks.run

    def noted(self: Chunks, env: list, size: int) -> bool:
        used.append(size)
        return run(self, env, size)

    monkeypatch.setattr(Chunks, "run", noted)
    monkeypatch.setattr(chunks, "samples_in_chunk", lambda samples, held, threads: min(samples, 3))
    return used


def planned(model: nn.Module, x: Tensor) -> PlannedNetwork:
    """A plan that has run, so that it knows what it holds."""
    plan = bk.plan(model, x[:2], "a")
    plan(x[:2])
    return plan


def with_lists(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """(swapped network with lists, masked dense network of the same weights in float64)."""
    dense = copy.deepcopy(model)
    table = bk.ChannelTable.random(bk.swap_(model), ["a", "b"], 0.6, 0)
    return bk.attach_(model, table), masked_dense(dense, table, "a").double()


def assert_equal(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("network", SMALL)
@torch.no_grad()
def test_small_networks(network: str, layout: str, sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, masked = with_lists(randomise(SMALL[network]()))
    x = torch.randn(7, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    x = x.contiguous(memory_format=FORMATS[layout])
    plan = planned(model, x)
    got = plan(x)
    assert sizes == [3]
    assert_equal(got, masked(x.double()))
    monkeypatch.setattr(chunks, "samples_in_chunk", lambda samples, held, threads: samples)
    whole = plan(x)
    assert_equal(got, whole)
    assert got.stride() == whole.stride()
    assert sizes == [3]


@torch.no_grad()
def test_cut_ends_before_what_mixes_samples(sizes: list[int]) -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.first(x))
            return self.last(x - x.mean(0, keepdim=True))

    model, masked = with_lists(randomise(Centred()))
    x = torch.randn(8, 3, 9, 9)
    plan = planned(model, x)
    assert_equal(plan(x), masked(x.double()))
    assert sizes == [3]


@torch.no_grad()
def test_constant_with_an_entry_per_sample(sizes: list[int]) -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
            self.register_buffer("shifts", torch.randn(8, 8, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.relu(self.first(x) + self.shifts))

    model, masked = with_lists(randomise(Shifted()))
    x = torch.randn(8, 3, 9, 9)
    plan = bk.plan(model, x, "a")
    assert_equal(plan(x), masked(x.double()))


@torch.no_grad()
def test_results_that_share_memory_are_computed_at_once(sizes: list[int]) -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.conv(x)
            return y, y[:, :, ::2, ::2]

    model, masked = with_lists(randomise(Views()))
    x = torch.randn(8, 3, 9, 9)
    plan = planned(model, x)
    for _ in range(2):
        y, part = plan(x)
        assert_equal(y, masked(x.double())[0])
        assert part.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()
    # Tried once.
    assert sizes == [3]


@torch.no_grad()
def test_mixed_batch(sizes: list[int]) -> None:
    model, _ = with_lists(randomise(SMALL["residual"]()))
    x = torch.randn(12, 3, 16, 16)
    numbers = torch.tensor([0, 1] * 6)
    plan = planned(model, x)
    bk.set_domain(plan, numbers)
    plan(x)
    sizes.clear()
    got = plan(x)
    assert sizes == [3, 3]
    for number, name in enumerate(("a", "b")):
        bk.set_domain(plan, name)
        for sample in (numbers == number).nonzero().flatten().tolist():
            assert_equal(got[sample : sample + 1], plan(x[sample : sample + 1]))


@torch.no_grad()
def test_small_batches_and_first_calls_are_not_cut(sizes: list[int]) -> None:
    model, masked = with_lists(randomise(SMALL["residual"]()))
    x = torch.randn(7, 3, 16, 16)
    plan = bk.plan(model, x, "a", check=False)
    assert_equal(plan(x), masked(x.double()))
    plan(x[:3])
    assert sizes == []
    plan(x)
    assert sizes == [3]


def test_size_of_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CACHE_BYTES", 32 << 20)
    mib = float(1 << 20)
    # Small batches stay whole, however large a sample is compared with the threads.
    assert samples_in_chunk(8, 3 * mib, 1) == 8
    assert samples_in_chunk(3, 100 * mib, 2) == 3
    # Of 20 MiB, in equal parts where there are such.
    assert samples_in_chunk(64, mib, 1) == 16
    assert samples_in_chunk(41, mib, 1) == 14
    assert samples_in_chunk(64, mib, 16) == 32
    for samples in range(1, 70):
        for held in (mib / 2, mib, 3 * mib, 100 * mib):
            size = samples_in_chunk(samples, held, 1)
            assert 1 <= size <= samples
            assert size == samples or size * held <= 20 * mib or size <= 2
