"""Packed weights of layers in eval mode: kept once, dropped when the weight changes, bounded, freed with the layer."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import bap_kernels as bk
from bap_kernels import ChannelLists
from bap_kernels.nn import GatheredConv2d

LISTS = ChannelLists([0, 3, 4, 7, 11], [1, 2, 8])


def _layer() -> tuple[GatheredConv2d, nn.Conv2d]:
    """The layer, and a dense one with the same weights."""
    dense = nn.Conv2d(12, 12, 3, padding=1)
    layer = GatheredConv2d(12, 12, 3, padding=1, channels=LISTS)
    layer.load_state_dict(dense.state_dict())
    return layer, dense


def _oracle(dense: nn.Conv2d, x: Tensor, lists: ChannelLists) -> Tensor:
    """The dense layer on inputs that are zero in channels that are not read; then the channels written."""
    on = torch.zeros(dense.in_channels)
    on[lists.in_index.long()] = 1
    y = dense(x * on[:, None, None])
    return y if lists.out_index is None else y[:, lists.out_index.long()]


def _close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def packed() -> Iterator[Callable[[], dict[str, int]]]:
    if bk.info().backends["native"] is not None:
        pytest.skip("no native backend here, nothing is packed")
    limit = bk.packed_cache_info()["limit_bytes"]
    bk.clear_packed_cache()
    with bk.use_backend("native"):
        yield bk.packed_cache_info
    bk.set_packed_cache_limit(limit)


def test_eval_packs_once(packed: Callable[[], dict[str, int]]) -> None:
    layer, _ = _layer()
    x = torch.randn(2, 12, 9, 7)
    layer(x)
    assert packed()["entries"] == 0
    layer.eval()
    with torch.no_grad():
        layer(x)
        first = packed()
        layer(x)
    assert first["entries"] == 1
    assert first["bytes"] > 0
    assert packed()["entries"] == 1
    assert packed()["hits"] == first["hits"] + 1
    assert packed()["misses"] == first["misses"]


def _step(layer: nn.Module) -> None:
    layer.weight.grad = torch.ones_like(layer.weight)
    torch.optim.SGD(layer.parameters(), lr=0.5).step()


def _in_place(layer: nn.Module) -> None:
    with torch.no_grad():
        layer.weight.mul_(-2)
        layer.bias.add_(1)


def _bias_only(layer: nn.Module) -> None:
    with torch.no_grad():
        layer.bias.add_(1)


def _load(layer: nn.Module) -> None:
    layer.load_state_dict({name: torch.randn_like(value) for name, value in layer.state_dict().items()})


def _replace(layer: nn.Module) -> None:
    layer.weight = nn.Parameter(torch.randn_like(layer.weight))


def _assign_data(layer: nn.Module) -> None:
    layer.weight.data = torch.randn_like(layer.weight)


def _move(layer: nn.Module) -> None:
    layer.double()
    _in_place(layer)
    layer.float()


@pytest.mark.parametrize("change", [_step, _in_place, _bias_only, _load, _replace, _assign_data, _move])
def test_packed_weights_follow_every_change(packed: Callable[[], dict[str, int]], change: Callable) -> None:
    layer, dense = _layer()
    layer.eval()
    x = torch.randn(2, 12, 9, 7)
    with torch.no_grad():
        before = layer(x)
    assert packed()["entries"] == 1
    change(layer)
    dense.load_state_dict(layer.state_dict())
    with torch.no_grad():
        after = layer(x)
        _close(after, _oracle(dense, x, LISTS))
    assert not torch.allclose(after, before)


def test_packed_weights_of_two_domains(packed: Callable[[], dict[str, int]]) -> None:
    layer, dense = _layer()
    other = ChannelLists([0, 3, 4, 7, 10], [1, 2, 9])
    layer.attach({"a": LISTS, "b": other})
    layer.eval()
    x = torch.randn(2, 12, 9, 7)
    with torch.no_grad():
        for _ in range(2):
            for name, lists in (("a", LISTS), ("b", other)):
                layer.set_domain(name)
                _close(layer(x), _oracle(dense, x, lists))
    assert packed()["entries"] == 2


def test_packed_weights_stay_below_the_limit(packed: Callable[[], dict[str, int]]) -> None:
    layers = [GatheredConv2d(64, 64, 1, channels=ChannelLists(range(0, 64, 2))).eval() for _ in range(4)]
    dense = [nn.Conv2d(64, 64, 1) for _ in layers]
    x = torch.randn(1, 64, 4, 4)
    with torch.no_grad():
        layers[0](x)
        one = packed()["bytes"]
        bk.set_packed_cache_limit(2 * one)
        assert packed()["limit_bytes"] == 2 * one
        for _ in range(2):
            for layer, its in zip(layers, dense, strict=True):
                its.load_state_dict(layer.state_dict())
                _close(layer(x), _oracle(its, x, layer.channels))
                assert packed()["bytes"] <= 2 * one
        assert packed()["entries"] == 2
        bk.set_packed_cache_limit(0)
        assert packed()["bytes"] == 0
        _close(layers[0](x), _oracle(dense[0], x, layers[0].channels))
        assert packed()["entries"] == 0


def test_dead_layers_free_their_entries(packed: Callable[[], dict[str, int]]) -> None:
    layers = [GatheredConv2d(64, 64, 1, channels=ChannelLists(range(0, 64, 2))).eval() for _ in range(3)]
    x = torch.randn(1, 64, 4, 4)
    with torch.no_grad():
        for layer in layers:
            layer(x)
        three = packed()
        assert three["entries"] == 3
        del layer, layers[1:]
        gc.collect()
        # Dead entries go at the next look into the cache, at the latest.
        layers[0](x)
    assert packed()["entries"] == 1
    assert packed()["bytes"] == three["bytes"] // 3


def test_negative_limit() -> None:
    with pytest.raises(ValueError, match=r"`limit_bytes` to be 0 or more and less than 2\*\*63, got -1"):
        bk.set_packed_cache_limit(-1)
