"""torch.fx traces each layer of the package as one node, with its default tracer and with torchvision's."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, fx, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import bap_kernels as bk
from bap_kernels import ChannelTable

X = torch.randn(2, 3, 8, 8)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        # Calls a layer twice, once by keyword.
        x = x + self.body(x) + self.body[0](input=x)
        return self.head(x.mean((2, 3)))


def _switched() -> nn.Module:
    torch.manual_seed(0)
    model = bk.nn.switch_(Net(), ["a", "b"], heads=True).eval()
    with torch.no_grad():
        for name in "ab":
            for layer in (model.stem, model.body[0]):
                layer.domains[name].score.copy_(torch.rand(layer.in_channels) * 0.01)
            model.norm.domains[name].bias.uniform_()
            model.head.domains[name].bias.uniform_()
    return model


def _gathered() -> nn.Module:
    return bk.swap_(_switched())


def _masked() -> nn.Module:
    torch.manual_seed(0)
    model = bk.swap_(Net().eval(), layer_type=bk.nn.MaskedConv2d)
    return bk.attach_(model, ChannelTable.random(model, ["a", "b"], 0.5, both=True))


MODELS = {"switched": _switched, "gathered": _gathered, "masked": _masked}


@pytest.mark.parametrize("kind", MODELS)
def test_symbolic_trace_keeps_layers_and_domain(kind: str) -> None:
    model = MODELS[kind]()
    bk.set_domain(model, "b")
    traced = fx.symbolic_trace(model)
    called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert called == ["stem", "norm", "body.0", "body.1", "body.2", "body.0", "head"]
    assert traced.stem is model.stem
    for duplicate in (traced, copy.deepcopy(traced)):
        for name in ("a", "b", "a"):
            bk.set_domain(model, name)
            bk.set_domain(duplicate, name)
            assert torch.equal(duplicate(X), model(X))


@pytest.mark.parametrize("kind", MODELS)
def test_traced_model_supports_mixed_batches(kind: str) -> None:
    model = MODELS[kind]()
    expected = []
    for sample, name in zip(X.split(1), "ba", strict=True):
        bk.set_domain(model, name)
        expected.append(model(sample))
    traced = fx.symbolic_trace(model)
    bk.set_domain(traced, torch.tensor([1, 0]))
    with torch.no_grad():
        torch.testing.assert_close(traced(X), torch.cat(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_traced_model_shares_parameters(kind: str) -> None:
    model = MODELS[kind]()
    bk.set_domain(model, "a")
    traced = fx.symbolic_trace(model.train())
    traced(X).square().sum().backward()
    assert model.stem.weight.grad is not None
    assert traced.stem.weight.grad is model.stem.weight.grad


@pytest.mark.parametrize("kind", MODELS)
def test_feature_extractor_of_torchvision_has_equal_features(kind: str) -> None:
    model = MODELS[kind]()
    bk.set_domain(model, "b")
    names = get_graph_node_names(model)[1]
    assert {"stem", "norm", "body.0", "head"} <= set(names)
    extractor = create_feature_extractor(model, ["norm", "body.2"])
    for name in "ab":
        bk.set_domain(extractor, name)
        bk.set_domain(model, name)
        features = extractor(X)
        normed = model.norm(model.stem(X))
        assert torch.equal(features["norm"], normed)
        assert torch.equal(features["body.2"], model.body(torch.relu(normed)))


def test_feature_extractor_of_resnet18_has_equal_logits() -> None:
    torch.manual_seed(0)
    model = bk.swap_(torchvision.models.resnet18(num_classes=4).eval())
    bk.set_domain(bk.attach_(model, ChannelTable.random(model, ["a", "b"], 0.5)), "b")
    extractor = create_feature_extractor(model, {"layer1": "early", "fc": "logits"})
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(extractor(x)["logits"], model(x))


def test_tracing_a_single_layer_raises() -> None:
    for layer in (bk.nn.GatheredConv2d(3, 4, 1), bk.nn.DomainBatchNorm2d(3, ["a"])):
        with pytest.raises(NotImplementedError, match=r"got the layer itself. Hint: put it into torch.nn.Sequential"):
            fx.symbolic_trace(layer)
        fx.symbolic_trace(nn.Sequential(layer))


def test_custom_tracer_with_layers_as_leaves_has_equal_results() -> None:
    class Leaves(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return not list(m.children()) or isinstance(m, (bk.nn.SwitchedConv2d, bk.nn.DomainBatchNorm2d))

    model: Any = _switched()
    bk.set_domain(model, "a")
    traced = fx.GraphModule(model, Leaves().trace(model))
    assert torch.equal(traced(X), model(X))
    assert pickle.loads(pickle.dumps(model)) is not None
