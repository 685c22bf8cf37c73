"""Weights that are put into layers past _apply: assigned checkpoints, swapped tensors, parameters set by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bap_kernels as bk
from bap_kernels import ChannelLists

pytestmark = pytest.mark.usefixtures("aten")

DOMAINS = {"a": [0], "b": [1, 2]}
DENSE = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
X = torch.randn(2, 3, 6, 5)


def _swapped(device: str, layer_type: type[nn.Module] = bk.nn.GatheredConv2d) -> nn.Module:
    with torch.device(device):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    bk.swap_(model, layer_type=layer_type)
    return bk.attach_(model, {name: {"0": ChannelLists(listed)} for name, listed in DOMAINS.items()})


def _expected(model: nn.Module, name: str, x: Tensor = X) -> Tensor:
    listed = DOMAINS[name]
    return F.conv2d(x[:, listed], model[0].weight[:, listed], model[0].bias)


def _check(model: nn.Module) -> None:
    for name in DOMAINS:
        bk.set_domain(model, name)
        torch.testing.assert_close(model[0](X), _expected(model, name))


def _load(model: nn.Module) -> None:
    model.load_state_dict(DENSE.state_dict(), assign=True)


def _to_empty(model: nn.Module) -> None:
    model.to_empty(device="cpu").load_state_dict(DENSE.state_dict())


def _by_hand(model: nn.Module) -> None:
    for name in ("weight", "bias"):
        model[0]._parameters[name] = nn.Parameter(getattr(DENSE[0], name).detach().clone())


def _by_attribute(model: nn.Module) -> None:
    model[0].weight, model[0].bias = (nn.Parameter(value.detach().clone()) for value in DENSE[0].parameters())


WAYS = [_load, _to_empty, _by_hand, _by_attribute]


@pytest.mark.parametrize("first", [None, "a"])
@pytest.mark.parametrize("layer_type", [bk.nn.GatheredConv2d, bk.nn.MaskedConv2d])
@pytest.mark.parametrize("way", WAYS)
def test_lists_follow_weights_that_leave_meta(
    way: Callable[[nn.Module], None], layer_type: type[nn.Module], first: str | None
) -> None:
    model = _swapped("meta", layer_type)
    bk.set_domain(model, first)
    way(model)
    if first is not None:
        torch.testing.assert_close(model[0](X), _expected(model, first))
    _check(model)


@pytest.mark.parametrize("way", WAYS)
def test_lists_of_a_masked_result_follow_too(way: Callable[[nn.Module], None]) -> None:
    with torch.device("meta"):
        model = bk.swap_(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval(), layer_type=bk.nn.MaskedConv2d)
    bk.set_domain(bk.attach_(model, {"a": {"0": ChannelLists(None, [1, 3])}}), "a")
    way(model)
    expected = F.conv2d(X, model[0].weight, model[0].bias) * torch.tensor([0, 1, 0, 1]).view(4, 1, 1)
    torch.testing.assert_close(model[0](X), expected)


@pytest.mark.parametrize("way", WAYS)
def test_lists_of_a_mixed_batch_follow_too(way: Callable[[nn.Module], None]) -> None:
    model = nn.Sequential(_swapped("meta")[0])
    bk.set_domain(model, torch.tensor([1, 0]))
    way(model) if way in (_by_hand, _by_attribute) else model.load_state_dict(
        nn.Sequential(DENSE[0]).state_dict(), assign=True
    )
    with torch.no_grad():
        result = model(X)
    expected = [_expected(model, name, x) for name, x in zip("ba", X.split(1), strict=True)]
    torch.testing.assert_close(result, torch.cat(expected))


def test_lists_follow_a_weight_that_goes_to_meta_by_hand() -> None:
    model = _swapped("cpu")
    bk.set_domain(model, "a")
    model[0].weight, model[0].bias = (nn.Parameter(value.to("meta")) for value in DENSE[0].parameters())
    assert model[0](X.to("meta")).shape == (2, 4, 4, 3)
    _by_attribute(model)
    _check(model)


@pytest.fixture(params=["set_swap_module_params_on_conversion", "set_overwrite_module_params_on_conversion"])
def _future(request: pytest.FixtureRequest) -> Iterator[None]:
    change = getattr(torch.__future__, request.param)
    change(True)
    yield
    change(False)


@pytest.mark.usefixtures("_future")
@pytest.mark.parametrize("assign", [False, True])
def test_parameters_that_are_swapped_or_overwritten(assign: bool) -> None:
    model = _swapped("cpu")
    bk.set_domain(model, "a")
    # An eval forward keeps packed weights.
    for _ in range(3):
        model(X)
    model.load_state_dict(DENSE.state_dict(), assign=assign)
    _check(model)
    model.double().float()
    _check(model)
    model = _swapped("meta")
    model.load_state_dict(DENSE.state_dict(), assign=True)
    _check(model)
    model = _swapped("meta")
    _to_empty(model)
    _check(model)


@pytest.mark.usefixtures("_future")
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_switches_of_parameters_that_are_swapped_or_overwritten(device: str) -> None:
    with torch.device(device):
        model = bk.nn.switch_(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), ["a", "b"]).eval()
    bk.set_domain(model, "a")
    if device == "cpu":
        with torch.no_grad():
            model[0].domains["a"].score[1] = 0
        model(X)
    model.load_state_dict(DENSE.state_dict(), assign=device == "meta")
    listed = [0, 2] if device == "cpu" else [0, 1, 2]
    for change in (lambda: None, model.double, model.float):
        change()
        assert model[0].domains["a"].score.dtype == torch.float32
        x = X.to(model[0].weight.dtype)
        expected = F.conv2d(x[:, listed], model[0].weight[:, listed], model[0].bias)
        torch.testing.assert_close(model[0](x), expected)


def test_head_for_other_classes_on_meta_counts_as_missing() -> None:
    with torch.device("meta"):
        plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4, 5))
        model = bk.nn.switch_(plain, ["a", "b"], heads={"a": 5, "b": 7})
    state = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4, 5)).state_dict()
    with pytest.raises(RuntimeError, match=r"Missing key.*2\.domains\.b\.weight"):
        model.load_state_dict(state, assign=True)
    model.load_state_dict(
        state | {"2.domains.b.weight": torch.zeros(7, 4), "2.domains.b.bias": torch.ones(7)}, assign=True
    )
    bk.set_domain(model.eval(), "b")
    assert model(torch.randn(1, 3, 1, 1)).tolist() == [[1.0] * 7]
