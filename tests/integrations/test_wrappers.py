"""Wrappers and frameworks around a network: sharding, offloading, quantisation, and code in the style of mmengine."""

from __future__ import annotations

import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.ao import quantization
from torch.nn.modules.batchnorm import _BatchNorm

import bap_kernels as bk
from tests.integrations.kinds import DOMAINS, KINDS, LAYERED, X, assert_same, dense, network_of, outputs, planned


@pytest.fixture
def process_group() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", rank=0, world_size=1, store=dist.FileStore(f"{folder}/store", 1))
        yield
        dist.destroy_process_group()


def _sharded(model: nn.Module, *parts: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    for part in (*parts, model):
        fully_shard(part, mesh=mesh)  # type: ignore[call-overload]
    return model


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("kind", LAYERED)
def test_fully_shard_follows_the_domain(kind: str, inner: bool) -> None:
    model = KINDS[kind]()
    expected = outputs(model)
    sharded = _sharded(model, *([model.get_submodule("conv2")] if inner else []))
    assert_same(outputs(sharded), expected)
    for _ in range(2):
        bk.set_domain(sharded.train(), DOMAINS[1])
        sharded(X).square().mean().backward()
    assert all(part.grad is not None for part in sharded.get_submodule("conv2").parameters(recurse=False))
    assert_same(outputs(sharded.eval()), outputs(sharded), 1e-6)
    if kind == "switched" and inner:
        with pytest.raises(NotImplementedError, match="expected `score` to hold its values, got a DTensor that stands"):
            sharded.get_submodule("conv2").channels(DOMAINS[0])  # type: ignore[operator]


@pytest.mark.usefixtures("process_group")
def test_fully_shard_of_layers_inside_of_a_plan_is_refused() -> None:
    model = planned()
    _sharded(model, network_of(model).get_submodule("conv2"))
    with pytest.raises(NotImplementedError, match=r"plan\(\): .* got a DTensor that stands for others: conv2\.weight"):
        model(X)


def _offloaded(layer: nn.Module) -> None:
    """As accelerate offloads a layer: its parameters are on the meta device but while it runs."""
    values = {name: parameter.detach().clone() for name, parameter in layer.named_parameters(recurse=False)}
    own = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        for name, value in values.items():
            layer._parameters[name] = nn.Parameter(value, requires_grad=False)
        try:
            return own(*args, **kwargs)
        finally:
            for name, value in values.items():
                layer._parameters[name] = nn.Parameter(value.to("meta"), requires_grad=False)

    layer.forward = forward  # type: ignore[method-assign]
    for name, value in values.items():
        layer._parameters[name] = nn.Parameter(value.to("meta"), requires_grad=False)


@pytest.mark.parametrize("kind", ["swapped", "masked", "planned"])
def test_offloaded_layers_compute_the_same(kind: str) -> None:
    model = KINDS[kind]()
    expected = outputs(model)
    for layer in network_of(model).modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            _offloaded(layer)
    assert_same(outputs(model), expected)


def test_offloaded_scores_are_refused() -> None:
    model = KINDS["switched"]()
    for layer in model.modules():
        if isinstance(layer, bk.nn.ChannelSwitch):
            _offloaded(layer)
    with pytest.raises(NotImplementedError, match="expected `score` to hold its values, got one on the meta device"):
        outputs(model)


@pytest.mark.parametrize("kind", LAYERED)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_dynamic_quantisation_of_linear_layers(kind: str) -> None:
    model = KINDS[kind]()
    expected = outputs(model)
    quantised = quantization.quantize_dynamic(model, {nn.Linear}).eval()
    assert_same(outputs(quantised), expected, 5e-2)
    if kind == "swapped":
        assert_same(outputs(bk.plan(quantised, X, DOMAINS[0])), expected, 5e-2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_quantised_inputs_are_refused_by_name(kind: str) -> None:
    model = KINDS[kind]()
    bk.set_domain(model, DOMAINS[0])
    with (
        pytest.raises(
            NotImplementedError, match=r"gathered_conv2d.*expected `input` .* got a quantised one. Hint: con"
        ),
        torch.no_grad(),
    ):
        model(torch.quantize_per_tensor(X, 0.1, 0, torch.quint8))
    if kind != "planned":
        with pytest.raises(NotImplementedError, match="got one in oneDNN's own format"), torch.no_grad():
            network_of(model).get_submodule("conv1")(X.to_mkldnn())


@pytest.mark.parametrize("kind", ["swapped", "switched"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_fx_quantisation_leaves_the_layers_in_float(kind: str) -> None:
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    model = KINDS[kind]()
    expected = outputs(model)
    bk.set_domain(model, DOMAINS[0])
    prepared = prepare_fx(model, quantization.get_default_qconfig_mapping("x86"), (X,))
    outputs(prepared)
    assert_same(outputs(convert_fx(prepared)), expected, 0.1)


class AnyBatchNorm(_BatchNorm):
    """What libraries make of SyncBatchNorm, which does not run on CPUs in training."""

    def _check_input_dim(self, input: Tensor) -> None:
        return


def _reverted(module: nn.Module) -> nn.Module:
    if isinstance(module, nn.SyncBatchNorm):
        norm = AnyBatchNorm(module.num_features, module.eps, module.momentum)
        norm.__dict__.update(_parameters=module._parameters, _buffers=module._buffers)
        return norm.train(module.training)
    for name, child in module.named_children():
        module.add_module(name, _reverted(child))
    return module


@pytest.mark.parametrize("kind", KINDS)
def test_reverted_sync_batchnorm(kind: str) -> None:
    model = KINDS[kind]()
    expected = outputs(model)
    model = _reverted(nn.SyncBatchNorm.convert_sync_batchnorm(model))
    assert sum(isinstance(module, AnyBatchNorm) for module in model.modules()) == (6 if kind == "switched" else 3)
    assert_same(outputs(model), expected)
    network = network_of(model)
    again = bk.plan(network, X, DOMAINS[0])
    assert_same(outputs(again), expected)
    assert "AnyBatchNorm" not in repr(again)  # folded into the convolutions


def test_reverted_sync_batchnorm_becomes_one_per_domain() -> None:
    model = bk.nn.switch_(_reverted(nn.SyncBatchNorm.convert_sync_batchnorm(dense())), DOMAINS)
    assert type(model.bn1) is bk.nn.DomainBatchNorm2d
    assert type(model.bn1.domains["cars"]) is AnyBatchNorm


@pytest.mark.parametrize("kind", LAYERED)
def test_layers_are_found_by_the_name_of_a_direct_base(kind: str) -> None:
    """As mmengine's ``initialize`` chooses layers: by the class's name or those of its bases."""
    model = KINDS[kind]()
    chosen = [
        name
        for name, module in model.named_modules()
        if {type(module).__name__, *(base.__name__ for base in type(module).__bases__)} & {"Conv2d"}
    ]
    assert chosen == ["conv1", "depthwise", "conv2", "conv3"]


def _load_in_parts(module: nn.Module, state: Any, prefix: str = "") -> list[str]:
    """As mmcv and mmengine load: module by module, past ``load_state_dict``."""
    missing: list[str] = []
    module._load_from_state_dict(state, prefix, {}, True, missing, [], [])
    for name, child in module._modules.items():
        if child is not None:
            missing += _load_in_parts(child, state, f"{prefix}{name}.")
    return missing


@pytest.mark.parametrize("kind", LAYERED)
@pytest.mark.parametrize("plain", [False, True])
def test_checkpoints_with_prefixes_load_module_by_module(kind: str, plain: bool) -> None:
    source = dense() if plain else KINDS[kind]()
    with torch.no_grad():
        for parameter in source.parameters():
            if parameter.dim() > 1:
                parameter *= 1.5
    checkpoint = {"meta": {}, "state_dict": OrderedDict((f"module.{k}", v) for k, v in source.state_dict().items())}
    state = OrderedDict((key.removeprefix("module."), value) for key, value in checkpoint["state_dict"].items())
    model = KINDS[kind]()
    assert _load_in_parts(model, state) == []
    assert torch.equal(model.get_submodule("conv2").weight, source.get_submodule("conv2").weight)  # type: ignore[arg-type]
    expected = KINDS[kind]()
    expected.load_state_dict(source.state_dict())
    assert_same(outputs(model), outputs(expected))
