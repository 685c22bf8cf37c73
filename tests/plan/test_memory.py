"""What plans of several domains hold, and how they share packed weights."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import bap_kernels as bk
from bap_kernels._load import _C
from tests.networks import Residual, randomise

pytestmark = pytest.mark.skipif(bool(_C.unsupported_reason("native")), reason=str(_C.unsupported_reason("native")))

NAMES = [f"domain{number}" for number in range(10)]


@pytest.fixture(autouse=True)
def _own_cache() -> Iterator[None]:
    _C.clear_packed_cache()
    with bk.use_backend("native"):
        yield
    _C.clear_packed_cache()


def network(names: list[str], model: nn.Module | None = None) -> nn.Module:
    model = bk.swap_(randomise(Residual() if model is None else model))
    return bk.attach_(model, bk.ChannelTable.random(model, names, 0.5, 0))


def wide() -> nn.Sequential:
    """Layers that read lists; every output is read by a classifier that lists nothing."""
    layers = [nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(64, 96, 1), nn.Flatten(), nn.Linear(96 * 64, 4))


def used(model: nn.Module, x: torch.Tensor, names: list[str]) -> list[torch.Tensor]:
    results = []
    for name in names:
        bk.set_domain(model, name)
        results.append(model(x))
    return results


def packed(memory: bk.NetworkMemory) -> int:
    return sum(memory.packed.values()) + memory.packed_shared + memory.packed_unused


@pytest.mark.parametrize("model", [Residual, wide])
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
@torch.no_grad()
def test_plans_of_ten_domains(model: type[nn.Module], format: torch.memory_format) -> None:
    x = torch.randn(2, 3, 8, 8).contiguous(memory_format=format)
    net = network(NAMES, model())
    results, held, one = {}, {}, 0
    for memory in ("fast", "auto", "shared"):
        _C.clear_packed_cache()
        planned = bk.plan(net, x, NAMES[0], check=False, memory=memory)
        planned(x)
        one = planned.memory().weights
        results[memory] = used(planned, x, NAMES)
        held[memory] = planned.memory()
        # Copies of norms and lists are each domain's.
        assert packed(held[memory]) == bk.packed_cache_info()["bytes"]
        _C.clear_packed_cache()
        assert packed(planned.memory()) == 0
    for name, *of_modes in zip(NAMES, *results.values(), strict=True):
        assert torch.equal(of_modes[0], of_modes[1]), name
        assert torch.equal(of_modes[0], of_modes[2]), name
    copies = sum(held["shared"].copies.values()) - held["shared"].copies[NAMES[0]]
    assert held["shared"].weights - copies <= 1.1 * one
    assert packed(held["shared"]) <= packed(held["auto"]) <= packed(held["fast"])


@torch.no_grad()
def test_swapped_layers_of_ten_domains() -> None:
    net, x = network(NAMES, wide()), torch.randn(8, 3, 8, 8)
    sizes: dict[str, list[int]] = {}
    before = _C.get_packed_memory()
    try:
        for memory in ("fast", "auto"):
            _C.set_packed_memory(memory)
            for names in (NAMES[:1], NAMES):
                _C.clear_packed_cache()
                used(net, x, names)
                held = bk.memory(net)
                assert packed(held) == bk.packed_cache_info()["bytes"]
                assert held.activations is None
                sizes.setdefault(memory, []).append(held.weights - sum(held.copies.values()))
                assert set(held.packed) == (set(names) if memory == "fast" else set())
    finally:
        _C.set_packed_memory(before)
    assert sizes["auto"][1] == sizes["auto"][0]
    assert sizes["fast"][1] > 3 * sizes["fast"][0]


@torch.no_grad()
def test_memory_counts_what_is_allocated() -> None:
    net, x = network(NAMES[:2]), torch.randn(2, 3, 8, 8)
    planned = bk.plan(net, x, NAMES[0], memory="fast")
    used(planned, x, NAMES[:2])
    held = planned.memory()
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*net.parameters(), *net.buffers())
    }
    assert held.parameters == sum(storages.values())
    assert held.activations == planned.peak_bytes()
    assert all(held.copies[name] > 0 for name in NAMES[:2])
    assert all(held.packed[name] > 0 for name in NAMES[:2])
    assert held.total == held.weights + held.activations
    assert held.weights == held.parameters + sum(held.copies.values()) + packed(held)
    row = next(row for row in held.layers if row.weight)
    assert row.weight == net.get_submodule(row.name).weight.nbytes  # type: ignore[union-attr]
    assert bk.memory(planned) == held
    lines = str(held).splitlines()
    assert lines[0].startswith("parameters and buffers")
    assert lines[-1].split()[0] == "total"
    assert float(lines[-1].split()[-2]) == pytest.approx(held.total / 2**20, abs=1e-3)
    assert any(line.startswith("packed for 'domain1'") for line in lines)
    # Lists that are gone leave what was packed for them until it is evicted.
    bk.attach_(net, bk.ChannelTable.random(net, NAMES[:1], 0.4, 7))
    bk.set_domain(net, NAMES[0])
    assert bk.memory(net).packed_unused > 0


@torch.no_grad()
def test_weight_updates_reach_shared_plans() -> None:
    net, x = network(NAMES[:3], wide()), torch.randn(2, 3, 8, 8)
    planned = bk.plan(net, x, NAMES[0], memory="shared")
    used(planned, x, NAMES[:3])
    for change in (lambda w: w.mul_(2), lambda w: w.data.mul_(0.5).add_(0.1)):
        for name, parameter in net.named_parameters():
            if name.endswith("weight"):
                change(parameter)
        fresh = bk.plan(copy.deepcopy(net), x, NAMES[0], memory="fast")
        for got, expected in zip(used(planned, x, NAMES[:3]), used(fresh, x, NAMES[:3]), strict=True):
            assert torch.equal(got, expected)


@torch.no_grad()
def test_shared_mixed_batches() -> None:
    net, x = network(NAMES[:3]), torch.randn(5, 3, 8, 8)
    numbers = torch.tensor([2, 0, 1, 0, 2])
    results = []
    for memory in ("fast", "shared"):
        planned = bk.plan(net, x[:1], NAMES[0], memory=memory)
        bk.set_domain(planned, numbers)
        results.append(planned(x))
    assert torch.equal(*results)


@torch.no_grad()
def test_setting_of_the_thread_stays() -> None:
    net, x = network(NAMES[:1]), torch.randn(1, 3, 8, 8)
    before = _C.get_packed_memory()
    planned = bk.plan(net, x, NAMES[0], memory="shared")
    assert _C.get_packed_memory() == before
    with pytest.raises(ValueError, match="expected an input of shape"):
        planned(x[:, :2])
    assert _C.get_packed_memory() == before


@torch.no_grad()
def test_copies_keep_the_option() -> None:
    net, x = network(NAMES[:2]), torch.randn(1, 3, 8, 8)
    planned = bk.plan(net, x, NAMES[0], memory="shared")
    for other in (copy.deepcopy(planned), pickle.loads(pickle.dumps(planned))):
        _C.clear_packed_cache()
        used(other, x, NAMES[:2])
        assert len([count for count in other.memory().packed.values() if count]) <= 1


def test_other_memory_is_refused() -> None:
    with pytest.raises(ValueError, match=r"plan\(\): expected `memory` to be one of auto, fast, shared, got 'small'"):
        bk.plan(network(NAMES[:1]), torch.randn(1, 3, 8, 8), NAMES[0], memory="small")
