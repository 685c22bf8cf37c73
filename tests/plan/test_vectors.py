"""Plans with compact tensors of whole vectors, as on a GPU: the same results, and no other width."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import bap_kernels as bk
from bap_kernels.plan import dual_store, lowering, planned
from bap_kernels.plan.conv_steps import ConvStep, DepthwiseStep, GroupedStep
from bap_kernels.plan.planned import PlannedNetwork
from bap_kernels.plan.steps import CatStep
from tests.networks import LARGE, SMALL, Residual, masked_dense, random_network, randomise
from tests.plan.test_planned import FORMATS, assert_equal

# Eight channels of float32.
VECTOR, MULTIPLE = 32, 8


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(planned, "vector_bytes", lambda device: VECTOR)
    with bk.use_backend("aten"):
        yield


def swapped(model: nn.Module, density: float, seed: int, both: bool) -> tuple[nn.Module, nn.Module]:
    """(swapped network with ragged lists, masked dense network of the same weights)."""
    dense = copy.deepcopy(model)
    bk.swap_(model, layer_type=bk.nn.MaskedConv2d if both else bk.nn.GatheredConv2d)
    table = bk.ChannelTable.random(model, ["a", "b"], density, seed, both, exact=False)
    bk.attach_(model, table)
    return model, masked_dense(dense, table, "a")


def widths(plan: PlannedNetwork, x: Tensor) -> list[tuple[str, int, int]]:
    """(step, channels read, channels written) of all convolutions, after a check that they are whole vectors."""
    program, found = plan._program, []
    env: list = [None] * program.slots
    env[program.inputs[0]] = x
    for step in program.steps:
        before = [env[slot] for slot in step.reads]
        step(env)
        if isinstance(step, GroupedStep):
            continue
        if isinstance(step, (ConvStep, DepthwiseStep, CatStep)):
            total = int(step.kept.split("/")[1])
            written = env[step.out].shape[1]
            assert written % MULTIPLE == 0 or written == total, (step.name, written, total)
        if isinstance(step, ConvStep):
            read = before[0].shape[1] if step.in_index is None else len(step.in_index)
            found.append((step.name, read, written))
            if step.dual_store is not None:
                assert env[step.dual_store].shape[1] % MULTIPLE == 0
    return found


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("both", [False, True], ids=["in", "both"])
@pytest.mark.parametrize("network", SMALL)
@torch.no_grad()
def test_small_networks(network: str, both: bool, layout: str) -> None:
    for density in (1.0, 0.6, 0.3):
        model, masked = swapped(randomise(SMALL[network]()), density, 3, both)
        x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        plan = bk.plan(model, x, "a", memory_format=FORMATS[layout])
        assert_equal(plan(x), masked(x))
        found = widths(plan, x)
        # What is read is a whole vector or all channels of a tensor without lists.
        full = {conv.in_channels for conv in model.modules() if isinstance(conv, nn.Conv2d)}
        assert all(read % MULTIPLE == 0 or read in full for _, read, _ in found), found


@pytest.mark.parametrize("chunk", range(2))
@torch.no_grad()
def test_random_networks(chunk: int) -> None:
    for seed in range(20 * chunk, 20 * chunk + 20):
        both = seed % 2 == 1
        model, masked = swapped(randomise(random_network(seed), seed), (0.3, 0.6, 0.9)[seed % 3], seed, both)
        x = torch.randn(2, 3, 7, 9, generator=torch.Generator().manual_seed(seed))
        plan = bk.plan(model, x, "a", memory_format=list(FORMATS.values())[seed // 2 % 2])
        assert_equal(plan(x), masked(x))
        widths(plan, x)


@pytest.mark.parametrize("network", ["resnet50", "densenet121"])
@torch.no_grad()
def test_known_networks(network: str) -> None:
    model, masked = swapped(randomise(LARGE[network]()), 0.5, 1, True)
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    plan = bk.plan(model, x, "a", memory_format=torch.channels_last)
    assert_equal(plan(x), masked(x), 1e-4)
    widths(plan, x)


@torch.no_grad()
def test_dual_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dual_store, "dual_store_pays", lambda *args: True)
    stores = 0
    for network in SMALL:
        model, masked = swapped(randomise(SMALL[network]()), 0.6, 3, False)
        x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        plan = bk.plan(model, x, "a", memory_format=torch.channels_last)
        stores += sum(isinstance(step, ConvStep) and step.dual_store is not None for step in plan._program.steps)
        assert_equal(plan(x), masked(x))
        widths(plan, x)
    assert stores > 0


@torch.no_grad()
def test_mixed_batches_and_further_domains() -> None:
    model, _ = swapped(randomise(Residual()), 0.5, 3, False)
    x = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    plan = bk.plan(model, x, "a")
    numbers = torch.tensor([1, 0, 1, 1, 0])
    expected = []
    for sample, number in zip(x, numbers.tolist(), strict=True):
        bk.set_domain(plan, ["a", "b"][number])
        expected.append(plan(sample[None]))
    bk.set_domain(plan, numbers)
    assert_equal(plan(x), torch.cat(expected))


@torch.no_grad()
def test_changed_weights_are_used() -> None:
    model, _ = swapped(randomise(Residual()), 0.5, 3, False)
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    plan = bk.plan(model, x, "a")
    before = plan(x)
    for conv in model.modules():
        if isinstance(conv, nn.Conv2d):
            conv.weight.mul_(1.1)
    bk.set_domain(model, "a")
    assert not torch.allclose(plan(x), before)
    assert_equal(plan(x), model(x))


@torch.no_grad()
def test_dtypes_have_their_own_multiples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planned, "vector_bytes", lambda device: 16)
    for dtype, multiple in ((torch.float32, 4), (torch.bfloat16, 8), (torch.float64, 2)):
        conv = bk.nn.GatheredConv2d(32, 16, 1, channels=bk.ChannelLists(range(0, 32, 3)))
        model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), conv).to(dtype).eval()
        x = torch.randn(1, 3, 8, 8).to(dtype)
        plan = bk.plan(model, x)
        first = plan._program.steps[1]
        assert first.parameters["weight"].shape[0] == -(-11 // multiple) * multiple
        assert f"width {-(-11 // multiple) * multiple}" in repr(plan)


def test_devices() -> None:
    assert lowering.vector_bytes(torch.device("cuda", 1)) == 16
    assert lowering.vector_bytes(torch.device("cpu")) == 0
