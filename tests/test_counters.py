"""MAC counts of ptflops, Torch-Pruning, fvcore and PyTorch, against counts by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import bap_kernels as bk
from bap_kernels import ChannelLists
from bap_kernels.counters import fvcore_handles, layer_macs, module_hooks

X = torch.randn(1, 3, 8, 8)


def _model(kind: str) -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.Conv2d(8, 6, 1, bias=False)
    ).eval()
    if kind == "dense":
        return model
    if kind == "switched":
        bk.nn.switch_(model, ["a"])
        with torch.no_grad():
            model[0].domains["a"].score[0] = 0
            model[2].domains["a"].score[:5] = 0
    else:
        bk.swap_(model, layer_type=bk.nn.MaskedConv2d if kind == "masked" else None)
        write = [0, 1, 2, 5] if kind == "masked" else None
        bk.attach_(model, {"a": {"0": ChannelLists([1, 2]), "2": ChannelLists([1, 2, 3], write)}})
    bk.set_domain(model, "a")
    return model


def _by_hand(kind: str) -> int:
    in_first, out_last = (3, 6) if kind == "dense" else (2, 4 if kind == "masked" else 6)
    return 36 * 9 * in_first * 8 + 16 * 9 * 8 + 16 * (8 if kind == "dense" else 3) * out_last


KINDS = ["dense", "gathered", "masked", "switched"]


@pytest.mark.parametrize("kind", KINDS)
def test_flop_counter_counts_two_per_mac(kind: str) -> None:
    model = _model(kind)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(X)
    assert counter.get_total_flops() == 2 * _by_hand(kind)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_layer_macs_sum_to_count_by_hand(kind: str) -> None:
    model = _model(kind)
    total, x = 0, X
    for layer in model:
        y = layer(x)
        total += layer_macs(layer, x, y)
        x = y
    assert total == _by_hand(kind)


def test_layer_macs_of_mixed_batch_use_lists_of_each_sample() -> None:
    model = bk.swap_(nn.Sequential(nn.Conv2d(3, 4, 1)))
    bk.attach_(model, {"a": {"0": ChannelLists([0])}, "b": {"0": ChannelLists([0, 1, 2])}})
    bk.set_domain(model, torch.tensor([1, 0, 1]))
    x = torch.randn(3, 3, 2, 2)
    with torch.no_grad():
        assert layer_macs(model[0], x, model(x)) == 4 * 4 * (3 + 1 + 3)


@pytest.mark.parametrize("kind", KINDS)
def test_ptflops_equals_count_by_hand(kind: str) -> None:
    ptflops = pytest.importorskip("ptflops", reason="ptflops is not installed")
    macs, _ = ptflops.get_model_complexity_info(
        _model(kind),
        (3, 8, 8),
        as_strings=False,
        print_per_layer_stat=False,
        backend="pytorch",
        custom_modules_hooks=module_hooks(),
    )
    assert macs == _by_hand(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_torch_pruning_equals_count_by_hand(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op_counter = pytest.importorskip("torch_pruning.utils.op_counter", reason="torch-pruning is not installed")
    for layer, hook in module_hooks().items():
        monkeypatch.setitem(op_counter.MODULES_MAPPING, layer, hook)
    assert op_counter.count_ops_and_params(_model(kind), X)[0] == _by_hand(kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_fvcore_equals_count_by_hand(kind: str) -> None:
    fvcore = pytest.importorskip("fvcore.nn", reason="fvcore is not installed")
    analysis = fvcore.FlopCountAnalysis(_model(kind), X).set_op_handle(**fvcore_handles())
    assert analysis.total() == _by_hand(kind)
