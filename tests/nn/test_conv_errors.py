"""What layers and swap_ refuse, by messages that name the rule and help."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bap_kernels as bk
from bap_kernels import ChannelLists
from bap_kernels.nn import GatheredConv2d, MaskedConv2d, SwitchedConv2d

X = torch.randn(2, 3, 6, 5)
LISTS = {
    "a": {"0": ChannelLists([0], [1, 2]), "1": ChannelLists([1, 2])},
    "b": {"0": ChannelLists([1], [3]), "1": ChannelLists([3])},
}


def _swapped() -> nn.Module:
    torch.manual_seed(0)
    model = bk.swap_(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)).eval())
    return bk.attach_(model, LISTS)


@pytest.mark.parametrize("kind", [GatheredConv2d, SwitchedConv2d])
@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((4.0, 4, 3), {}, TypeError, "`in_channels` to be an int, got 4.0"),
        ((4, -1, 3), {}, ValueError, "`out_channels` to be at least 0, got -1"),
        ((4, 4, 0), {}, ValueError, "`kernel_size` to be at least 1, got 0"),
        ((4, 4, (3, 3, 3)), {}, ValueError, r"`kernel_size` to be an int or a pair, got \(3, 3, 3\)"),
        ((4, 4, "3"), {}, TypeError, "`kernel_size` to be an int or a pair of ints, got '3'"),
        ((4, 4, 3), {"stride": 0}, ValueError, "`stride` to be at least 1, got 0"),
        ((4, 4, 3), {"stride": (1, 2.0)}, TypeError, r"`stride` to be an int or a pair of ints, got \(1, 2.0\)"),
        ((4, 4, 3), {"dilation": (1, 0)}, ValueError, r"`dilation` to be at least 1, got \(1, 0\)"),
        ((4, 4, 3), {"padding": -1}, ValueError, "`padding` to be at least 0, got -1"),
        (
            (4, 4, 3),
            {"padding": (1, 1, 1, 1)},
            ValueError,
            r"`padding` .* a pair, got \(1, 1, 1, 1\). Hint: .*ZeroPad2d",
        ),
        ((4, 4, 3), {"padding": "some"}, ValueError, "padding"),
        ((4, 4, 3), {"padding_mode": "mirror"}, ValueError, "`padding_mode` to be one of .*got 'mirror'"),
        ((4, 4, 3), {"groups": 0}, ValueError, "`groups` to be at least 1, got 0"),
        ((4, 4, 3), {"groups": 2}, NotImplementedError, "groups=2 with 4 -> 4 channels.*Hint: keep torch.nn.Conv2d"),
    ],
)
def test_constructor_errors(
    kind: type[nn.Module], arguments: tuple, options: dict, error: type[Exception], message: str
) -> None:
    options = options | ({"domains": ["a"]} if kind is SwitchedConv2d else {})
    with pytest.raises(error, match=message):
        kind(*arguments, **options)


@pytest.mark.parametrize(
    "make", [lambda: GatheredConv2d(4, 4, 1, channels=[0]), lambda: _swapped()[0].attach({"a": [0]})]
)
def test_lists_of_another_type_raise(make: Callable[[], Any]) -> None:
    with pytest.raises(TypeError, match=r"to be ChannelLists, got list. Hint: ChannelLists\(in_index"):
        make()


def test_dense_options_that_pytorch_refuses_are_not_swapped() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=(1, 1, 1, 1)))
    with pytest.raises(RuntimeError):
        model(X)
    assert bk.nn.skipped(model) == {"0": "its padding is (1, 1, 1, 1), not a pair"}
    with pytest.raises(RuntimeError):
        bk.swap_(model)(X)


@pytest.mark.parametrize("padding", [2, (1, 0), "same"])
def test_padding_set_afterwards_in_any_form(padding: Any) -> None:
    layer = GatheredConv2d(3, 4, 3)
    layer.padding = padding
    torch.testing.assert_close(layer(X), F.conv2d(X, layer.weight, layer.bias, padding=padding))
    layer.padding = (1, 1, 1, 1)
    with pytest.raises(ValueError, match="padding"):
        layer(X)


def test_swapped_layers_change_their_type_and_keep_their_lists() -> None:
    model = _swapped()
    bk.set_domain(model, "b")
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)).eval()
    plain.load_state_dict(model.state_dict())
    seen = []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    assert bk.swap_(model) is model
    assert [type(layer) for layer in model] == [GatheredConv2d] * 2
    weight = model[0].weight
    bk.swap_(model, layer_type=MaskedConv2d)
    assert [type(layer) for layer in model] == [MaskedConv2d] * 2
    assert model[0].weight is weight
    assert model[0].channels == LISTS["b"]["0"]
    for name, listed in LISTS.items():
        bk.set_domain(model, name)
        on = torch.zeros(4).index_fill(0, listed["0"].out_index.long(), 1).view(4, 1, 1)
        read = F.conv2d(X[:, listed["0"].in_index], plain[0].weight[:, listed["0"].in_index], plain[0].bias) * on
        torch.testing.assert_close(model[0](X), read)
        torch.testing.assert_close(model(X), plain[1](read))
    assert len(seen) == 4
    bk.swap_(model, layer_type=GatheredConv2d)
    assert [type(layer) for layer in model] == [GatheredConv2d] * 2
    assert model[0](X).shape[1] == 1


def test_the_hint_of_a_mixed_batch_with_different_widths_helps() -> None:
    model = nn.Sequential(_swapped()[0])
    bk.set_domain(model, torch.tensor([1, 0]))
    with torch.no_grad(), pytest.raises(ValueError, match=r"Hint: swap_\(model, layer_type=MaskedConv2d\) keeps"):
        model(X)
    bk.swap_(model, layer_type=MaskedConv2d)
    bk.set_domain(model, torch.tensor([1, 0]))
    with torch.no_grad():
        assert model(X).shape == (2, 4, 4, 3)


def test_the_hint_for_lists_on_meta_helps() -> None:
    with pytest.raises(ValueError, match=r"Hint: make the lists first, then move them with .to\('meta'\)"):
        ChannelLists(torch.zeros(1, dtype=torch.int32, device="meta"))
    with torch.device("meta"):
        lists = ChannelLists([0, 2]).to("meta")
        layer = GatheredConv2d(3, 4, 3, channels=lists)
        assert layer(torch.randn(1, 3, 5, 5)).shape == (1, 4, 3, 3)
    layer.to_empty(device="cpu")
    assert layer.channels.in_index.tolist() == [0, 2]


def test_another_layer_type_raises() -> None:
    with pytest.raises(TypeError, match=r"`layer_type` to be GatheredConv2d or MaskedConv2d, got <class 'torch"):
        bk.swap_(nn.Sequential(nn.Conv2d(3, 4, 1)), layer_type=nn.Conv2d)


@pytest.mark.parametrize("shape", [(1, 2, 3, 6, 5), (3, 6)])
def test_inputs_that_are_no_images_are_refused_with_a_hint_that_helps(shape: tuple[int, ...]) -> None:
    model = _read_only()
    bk.set_domain(model, "a")
    with pytest.raises(
        ValueError, match=rf"got {len(shape)} dimensions. Hint: images have 4; .*input.flatten\(0, -4\)"
    ):
        model(torch.randn(shape))
    if len(shape) == 5:
        assert model(torch.randn(shape).flatten(0, -4)).shape == (2, 2, 4, 3)
    assert model[0](input=X).shape == model[0](X).shape


class Half(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight / 2


def _parametrized(layer: nn.Module) -> None:
    nn.utils.parametrize.register_parametrization(layer, "weight", Half())


def _weight_norm(layer: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(layer)


def _spectral_norm(layer: nn.Module) -> None:
    nn.utils.parametrizations.spectral_norm(layer)


def _old_spectral_norm(layer: nn.Module) -> None:
    nn.utils.spectral_norm(layer)


def _pruned(layer: nn.Module) -> None:
    import torch.nn.utils.prune as prune

    prune.l1_unstructured(layer, "weight", 0.5)


COMPUTED = [_parametrized, _weight_norm, _spectral_norm, _old_spectral_norm, _pruned]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("change", COMPUTED)
@pytest.mark.parametrize("kind", ["gathered", "masked", "switched"])
def test_weights_that_are_computed_after_the_swap(kind: str, change: Callable, training: bool) -> None:
    """Against the same change of a dense layer, whose input is masked."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(3, 4, 3))
    model = copy.deepcopy(dense)
    if kind == "switched":
        bk.nn.switch_(model, ["a"])
        with torch.no_grad():
            model[0].domains["a"].score[0] = 0
    else:
        bk.swap_(model, layer_type=MaskedConv2d if kind == "masked" else None)
        bk.attach_(model, {"a": {"0": ChannelLists([1, 2])}})
    bk.set_domain(model, "a")
    for net in (dense, model):
        torch.manual_seed(1)
        change(net[0])
        net.train(training)
    x = X * torch.tensor([0.0, 1, 1]).view(3, 1, 1)
    for _ in range(3):
        torch.testing.assert_close(model(X), dense(x))
        # The computed weight follows its parameters.
        with torch.no_grad():
            for net in (dense, model):
                for name, value in net[0].named_parameters():
                    if "score" not in name:
                        value.mul_(1.5)
    x.requires_grad_(training)
    dense(x).square().sum().backward()
    model(X).square().sum().backward()
    own = dict(model.named_parameters())
    for name, value in dense.named_parameters():
        if value.dim() == 4 and change is not _spectral_norm and change is not _old_spectral_norm:
            wanted = value.grad * torch.tensor([0.0, 1, 1]).view(1, 3, 1, 1) if change is _parametrized else value.grad
            torch.testing.assert_close(own[name].grad, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", COMPUTED)
def test_computed_weights_are_named_by_skipped_and_refused_where_they_cannot_move(change: Callable) -> None:
    model = bk.nn.switch_(nn.Sequential(nn.Conv2d(3, 4, 3)), ["a"])
    change(model[0])
    assert "weight is computed" in bk.nn.skipped(model)["0"]
    before = model[0]
    assert bk.swap_(model)[0] is before
    with pytest.raises(NotImplementedError, match="weight is computed"):
        before.to_gathered()


def _read_only() -> nn.Module:
    """Layers that read a part and write all."""
    model = bk.swap_(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)).eval())
    return bk.attach_(model, {"a": {"0": ChannelLists([0, 2]), "1": ChannelLists([1, 2])}})


@pytest.mark.parametrize("lower", [lambda model: bk.plan(model, X, "a"), lambda model: bk.specialize(model, "a")])
@pytest.mark.parametrize("change", [_parametrized, _weight_norm, _spectral_norm])
def test_plans_of_computed_weights_compute_the_same(change: Callable, lower: Callable) -> None:
    model = _read_only()
    bk.set_domain(model, "a")
    change(model[1])
    model.eval()
    torch.testing.assert_close(lower(model)(X), model(X))


@pytest.mark.parametrize("change", [_old_spectral_norm, _pruned])
def test_weights_that_a_hook_computes_are_planned_and_refused_by_specialize(change: Callable) -> None:
    model = _read_only()
    bk.set_domain(model, "a")
    change(model[1])
    model.eval()
    torch.testing.assert_close(bk.plan(model, X, "a")(X), model(X))
    with pytest.raises(NotImplementedError, match=r"weights that are parameters, got '1', .* Hint: .*prune.remove"):
        bk.specialize(model, "a")


@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("kind", ["gathered", "switched"])
@pytest.mark.filterwarnings("ignore")
def test_export_to_onnx_names_specialize(tmp_path: Any, kind: str, dynamo: bool) -> None:
    if dynamo:
        pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    model = _read_only() if kind == "gathered" else bk.nn.switch_(nn.Sequential(nn.Conv2d(3, 4, 3)), ["a"]).eval()
    bk.set_domain(model, "a")
    with pytest.raises(Exception, match=r"bap_kernels.specialize\(model, domain\)"):
        torch.onnx.export(model, (X,), str(tmp_path / "model.onnx"), dynamo=dynamo)
    # Outside of an export it works as before.
    assert model(X).shape[0] == 2
