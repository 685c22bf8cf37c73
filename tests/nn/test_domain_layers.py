"""DomainBatchNorm2d and DomainLinear."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

from bap_kernels.nn import DomainBatchNorm2d, DomainLinear, domain_parameters


def _norm() -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(6, eps=1e-3, momentum=0.3)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor.uniform_(0.5, 2)
    return norm


def test_every_domain_is_a_batch_norm_of_its_own() -> None:
    layer = DomainBatchNorm2d.from_batch_norm2d(_norm(), ["a", "b"])
    mine = {name: copy.deepcopy(module) for name, module in layer.domains.items()}
    for step, name in enumerate("abaab"):
        x = torch.randn(4, 6, 3, 3) + step
        layer.set_domain(name)
        y, expected = layer(x), mine[name](x)
        assert torch.equal(y, expected)
        y.square().sum().backward()
        expected.square().sum().backward()
    assert not torch.equal(mine["a"].running_mean, mine["b"].running_mean)
    for name, norm in mine.items():
        for key, value in norm.state_dict().items():
            assert torch.equal(layer.state_dict()[f"domains.{name}.{key}"], value)
        assert torch.equal(layer.domains[name].weight.grad, norm.weight.grad)
    layer.eval()
    mine["b"].eval()
    assert torch.equal(layer(x), mine["b"](x))


def test_starts_from_copies_of_the_dense_batch_norm() -> None:
    norm = _norm().double().eval()
    norm.bias.requires_grad_(False)
    layer = DomainBatchNorm2d.from_batch_norm2d(norm, ["a", "b"])
    assert not layer.training
    x = torch.randn(2, 6, 3, 3, dtype=torch.float64)
    for name in ("a", "b"):
        layer.set_domain(name)
        assert torch.equal(layer(x), norm(x))
        one = layer.domains[name]
        assert (one.eps, one.momentum) == (1e-3, 0.3)
        assert one.weight is not norm.weight
        assert one.weight.requires_grad
        assert not one.bias.requires_grad


def test_options_of_the_constructor() -> None:
    layer = DomainBatchNorm2d(6, ["a"], 1e-2, None, affine=False, track_running_stats=False, dtype=torch.float64)
    one = layer.domains["a"]
    assert (one.eps, one.momentum, one.weight, one.running_mean) == (1e-2, None, None, None)
    assert DomainBatchNorm2d(6, ["a"], dtype=torch.float64).domains["a"].weight.dtype == torch.float64
    assert DomainBatchNorm2d(6, ["a"], device="meta").domains["a"].running_var.is_meta


def test_dense_state_goes_to_every_domain() -> None:
    norm = _norm()
    norm.num_batches_tracked.fill_(7)
    layer = DomainBatchNorm2d(6, ["a", "b"])
    layer.load_state_dict(norm.state_dict(), strict=True)
    for name in ("a", "b"):
        for key, value in norm.state_dict().items():
            assert torch.equal(layer.state_dict()[f"domains.{name}.{key}"], value)
    # Values for a domain win.
    state = dict(norm.state_dict())
    state.update({f"domains.b.{key}": value + 1 for key, value in norm.state_dict().items()})
    layer.load_state_dict(state, strict=True)
    assert torch.equal(layer.domains["a"].running_mean, norm.running_mean)
    assert torch.equal(layer.domains["b"].running_mean, norm.running_mean + 1)
    # The caller's dictionary is not touched.
    assert "running_mean" in state
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict(nn.BatchNorm2d(5).state_dict())
    state = dict(norm.state_dict())
    del state["running_var"]
    with pytest.raises(RuntimeError, match=r"Missing key.*domains\.a\.running_var"):
        layer.load_state_dict(state)


def test_own_state_round_trip() -> None:
    layer, other = (DomainBatchNorm2d.from_batch_norm2d(_norm(), ["a", "b"]) for _ in range(2))
    other.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(other.domains["b"].running_var, layer.domains["b"].running_var)
    del (state := layer.state_dict())["domains.a.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*domains\.a\.weight"):
        other.load_state_dict(state)


def test_adding_a_domain() -> None:
    layer = DomainBatchNorm2d.from_batch_norm2d(_norm(), ["a"])
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    layer.domains["a"].weight.grad = torch.ones(6)
    layer.add_domain("new")
    layer.add_domain("like", like="a")
    assert layer.domains["like"].weight.grad is None
    assert layer.domains["a"].weight.grad is not None
    for key, value in before.items():
        assert torch.equal(layer.state_dict()[key], value)
        assert torch.equal(layer.state_dict()[key.replace(".a.", ".like.")], value)
    assert torch.equal(layer.domains["new"].running_mean, torch.zeros(6))
    assert torch.equal(layer.domains["new"].weight, torch.ones(6))
    assert layer.domains["new"].momentum == 0.3
    with pytest.raises(ValueError, match="got 'a': it was given twice"):
        layer.add_domain("a")
    with pytest.raises(ValueError, match=r"one of \['a', 'new', 'like'\], got 'c'"):
        layer.add_domain("d", like="c")


def test_linear_has_classes_of_each_domain() -> None:
    layer = DomainLinear(8, {"a": 3, "b": 5}, dtype=torch.float64)
    x = torch.randn(4, 8, dtype=torch.float64)
    for name, size in (("a", 3), ("b", 5)):
        layer.set_domain(name)
        y = layer(x)
        one = layer.domains[name]
        assert y.shape == (4, size)
        torch.testing.assert_close(y, x @ one.weight.T + one.bias)
    y.sum().backward()
    assert layer.domains["a"].weight.grad is None
    torch.testing.assert_close(layer.domains["b"].weight.grad, x.sum(0).expand(5, 8))
    layer.add_domain("c", 7)
    layer.set_domain("c")
    assert layer(x).shape == (4, 7)
    assert DomainLinear(8, {"a": 3}, bias=False).domains["a"].bias is None


def test_linear_from_a_dense_one() -> None:
    dense = nn.Linear(8, 5, bias=False, dtype=torch.float64).eval()
    dense.weight.requires_grad_(False)
    layer = DomainLinear.from_linear(dense, {"a": 5, "b": 3})
    assert torch.equal(layer.domains["a"].weight, dense.weight)
    assert layer.domains["a"].weight is not dense.weight
    assert not layer.domains["a"].weight.requires_grad
    assert layer.domains["b"].weight.requires_grad
    assert layer.domains["b"].weight.dtype == torch.float64
    assert layer.domains["b"].bias is None
    assert not layer.training


def test_dense_classifier_loads_into_domains_with_as_many_outputs() -> None:
    dense, layer = nn.Linear(8, 5), DomainLinear(8, {"a": 5, "b": 3})
    before = layer.domains["b"].weight.detach().clone()
    layer.load_state_dict(dense.state_dict(), strict=True)
    assert torch.equal(layer.domains["a"].weight, dense.weight)
    assert torch.equal(layer.domains["a"].bias, dense.bias)
    assert torch.equal(layer.domains["b"].weight, before)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_are_independent(duplicate: Callable[[nn.Module], DomainBatchNorm2d]) -> None:
    layer = DomainBatchNorm2d.from_batch_norm2d(_norm(), ["a", "b"])
    layer.set_domain("b")
    other = duplicate(layer)
    assert other.active is other.domains["b"]
    before = layer.domains["b"].running_mean.clone()
    other(torch.randn(4, 6, 2, 2))
    assert torch.equal(layer.domains["b"].running_mean, before)
    assert not torch.equal(other.domains["b"].running_mean, before)


def test_active_domain_survives_moves() -> None:
    layer = DomainBatchNorm2d(6, ["a", "b"])
    layer.set_domain("b")
    layer.to("meta")
    assert layer(torch.empty(2, 6, 3, 3, device="meta")).is_meta
    layer.to_empty(device="cpu").load_state_dict(_norm().state_dict(), assign=True)
    layer.double().eval()
    x = torch.randn(2, 6, 3, 3, dtype=torch.float64)
    assert torch.equal(layer(x), layer.domains["b"](x))


@pytest.mark.parametrize("layer", [DomainBatchNorm2d(6, ["a", "b"]), DomainLinear(6, {"a": 1, "b": 2})])
def test_call_without_a_domain_raises(layer: nn.Module) -> None:
    with pytest.raises(RuntimeError, match=r"a domain to be active, got none. Hint: .* one of \['a', 'b'\]"):
        layer(torch.randn(2, 6, 3, 3))
    with pytest.raises(ValueError, match=r"`name` to be one of \['a', 'b'\], got None"):
        layer.set_domain(None)
    with pytest.raises(ValueError, match=r"`name` to be one of \['a', 'b'\], got 'c'"):
        layer.set_domain("c")


@pytest.mark.parametrize("name", ["a.b", "", "values", "training"])
def test_unusable_domain_names_raise(name: str) -> None:
    for make in (
        lambda: DomainBatchNorm2d(6, [name]),
        lambda: DomainBatchNorm2d.from_batch_norm2d(_norm(), [name]),
        lambda: DomainLinear(6, {name: 3}),
        lambda: DomainLinear(6, {"a": 3}).add_domain(name, 3),
    ):
        with pytest.raises(ValueError, match=f"`domains` to be usable names, got '{name}'"):
            make()


def test_domain_parameters() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 1), DomainBatchNorm2d(6, ["a", "b"]), DomainLinear(6, {"a": 3, "b": 3}, False)
    )
    assert [name for name, _ in domain_parameters(model, "b")] == [
        "1.domains.b.weight",
        "1.domains.b.bias",
        "2.domains.b.weight",
    ]
    named = dict(model.named_parameters())
    assert all(named[name] is parameter for name, parameter in domain_parameters(model))
    assert set(named) - {name for name, _ in domain_parameters(model)} == {"0.weight", "0.bias"}
    with pytest.raises(ValueError, match=r"`domain` to be one of \['a', 'b'\], got 'c'"):
        domain_parameters(model, "c")
