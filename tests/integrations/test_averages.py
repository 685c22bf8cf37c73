"""Averages of weights: EMA and SWA of torch and timm follow every domain; update_bn serves one and warns."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import bap_kernels as bk
from tests.integrations.kinds import DOMAINS, KINDS, LAYERED, X, assert_same, dense, network_of, outputs, switched


def _timm(name: str) -> Any:
    return getattr(pytest.importorskip("timm.utils", reason="timm is not installed"), name)


AVERAGES: dict[str, Callable[[nn.Module], Any]] = {
    "ModelEmaV2": lambda model: _timm("ModelEmaV2")(model, decay=0.5),
    "ModelEmaV3": lambda model: _timm("ModelEmaV3")(model, decay=0.5),
    "AveragedModel": AveragedModel,
    "AveragedModel with buffers": lambda model: AveragedModel(model, use_buffers=True),
    "AveragedModel, EMA": lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_averages_follow_in_every_domain(average: str, kind: str) -> None:
    model = KINDS[kind]()
    bk.set_domain(model, DOMAINS[1])
    averaged = AVERAGES[average](model)
    before = outputs(averaged.module)
    generator = torch.Generator().manual_seed(5)
    for _ in range(2):
        with torch.no_grad():
            for parameter in network_of(model).parameters():
                if parameter.dim() > 1:
                    parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
            for name, buffer in network_of(model).named_buffers():
                if "running_mean" in name:
                    buffer += 0.2
        update = averaged.update_parameters if isinstance(averaged, AveragedModel) else averaged.update
        update(model)
    # A network that never held other values.
    fresh = KINDS[kind]()
    fresh.load_state_dict(averaged.module.state_dict())
    expected = outputs(fresh)
    assert_same(outputs(averaged.module), expected)
    assert_same(outputs(averaged), expected)
    moved = [float((before[name] - expected[name]).abs().max()) for name in DOMAINS]
    assert min(moved) > 1e-2
    assert outputs(model).keys() == expected.keys()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", [kind for kind in LAYERED if kind != "switched"])
def test_update_bn_computes_shared_statistics_with_the_active_lists(kind: str) -> None:
    model = KINDS[kind]()
    bk.set_domain(model, DOMAINS[1])
    update_bn([X, X + 1], model)
    first = model.get_submodule("bn1")
    seen = torch.cat([model.get_submodule("conv1")(x) for x in (X, X + 1)])
    torch.testing.assert_close(first.running_mean, seen.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)


def test_update_bn_of_norms_per_domain_warns_and_names_what_to_call() -> None:
    model = switched()
    bk.set_domain(model, "cars")
    with pytest.warns(UserWarning, match=r"domains \['birds'\] were reset, .*'cars' alone .*recalibrate_bn"):
        update_bn([X], model)
    for layer in model.modules():
        if isinstance(layer, bk.nn.DomainBatchNorm2d):
            assert layer.domains["birds"].num_batches_tracked == 0
    averaged = AveragedModel(switched())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in DOMAINS:
            bk.nn.recalibrate_bn(averaged, [X, X + 1], name)
        averaged.train()
        for name in DOMAINS:
            bk.set_domain(averaged, name)
            averaged(X)


@pytest.mark.filterwarnings("error")
def test_norms_whose_batches_always_count_alike_do_not_warn() -> None:
    plain = dense()
    for norm in plain.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None
    model = bk.nn.switch_(plain, DOMAINS).train()
    bk.set_domain(model, "birds")
    model(X)


def test_update_bn_of_a_plan_is_refused() -> None:
    with pytest.raises(ValueError, match="train the model itself, then plan"):
        update_bn([X], KINDS["planned"]())
