"""Classifiers of switch_: which layers they are, and one for every domain."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bap_kernels as bk
from bap_kernels.nn import DomainConv2d, DomainLinear, SwitchedConv2d, add_domain_, switch_

SIZES = {"a": 5, "b": 7}
X = torch.randn(2, 3, 6, 6)


class Net(nn.Module):
    """A network whose `head` and `extra` the test chooses; `first` is the last layer by module order."""

    def __init__(self, head: nn.Module, extra: nn.Module | None = None) -> None:
        super().__init__()
        self.head, self.extra = head, extra
        self.stem, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        # Squeeze and excitation: linear layers that are no classifiers.
        self.down, self.up = nn.Linear(8, 4), nn.Linear(4, 8)

    def features(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        gate = torch.sigmoid(self.up(torch.relu(self.down(x.mean((2, 3))))))
        return x * gate[:, :, None, None]

    def forward(self, x: Tensor) -> Any:
        return self.head(self.features(x).mean((2, 3)))


class Pixels(Net):
    def forward(self, x: Tensor) -> Any:
        return {"out": F.interpolate(self.head(self.features(x)), scale_factor=2.0)}


class TwoHeads(Net):
    def forward(self, x: Tensor) -> Any:
        x = self.features(x).mean((2, 3))
        return (self.head(x) + self.extra(x)) / 2


class Attention(Net):
    def forward(self, x: Tensor) -> Any:
        tokens = self.features(x).flatten(2).transpose(1, 2)
        return self.head((tokens + self.extra(tokens, tokens, tokens)[0]).mean(1))


class Product(Net):
    """Applies a weight past the layer's forward."""

    def forward(self, x: Tensor) -> Any:
        return F.linear(self.extra(self.features(x).mean((2, 3))), self.head.weight)


class Branch(Net):
    def forward(self, x: Tensor) -> Any:
        if x.sum() > 1e9:
            return x
        return super().forward(x)


class Cosine(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(F.normalize(input), F.normalize(self.weight), self.bias)


class Scaled(nn.Linear):
    """What it multiplies by depends on the number of outputs."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.scale = self.out_features**-0.5

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.scale


class Named(nn.Linear):
    """A subclass that computes the same."""


def _heads(model: nn.Module) -> list[str]:
    return [name for name, one in model.named_modules() if isinstance(one, (DomainLinear, DomainConv2d))]


@pytest.mark.parametrize("head", [nn.Linear(8, 5), Named(8, 5), nn.Sequential(nn.Dropout(), nn.Linear(8, 5))])
def test_the_last_layer_is_the_classifier(head: nn.Module) -> None:
    plain = Net(head).eval()
    model = switch_(copy.deepcopy(plain), ["a", "b"], heads=SIZES).eval()
    assert _heads(model) == ["head" if isinstance(head, nn.Linear) else "head.1"]
    bk.set_domain(model, "a")
    torch.testing.assert_close(model(X), plain(X))
    bk.set_domain(model, "b")
    assert model(X).shape == (2, 7)


def test_attention_and_layers_inside_it_are_no_classifiers() -> None:
    model = Attention(nn.Linear(8, 5), nn.MultiheadAttention(8, 2, batch_first=True))
    switch_(model, ["a", "b"], heads=SIZES)
    assert _heads(model) == ["head"]
    with pytest.raises(NotImplementedError, match=r"'extra.out_proj', a NonDynamicallyQuantizableLinear, whose weight"):
        switch_(Attention(nn.Linear(8, 5), nn.MultiheadAttention(8, 2)), ["a"], heads="extra.out_proj")


def test_an_error_names_the_argument_that_chose_the_classifier() -> None:
    for arguments, argument in (({"heads": "fc"}, "heads"), ({"heads": SIZES, "head": "fc"}, "head")):
        with pytest.raises(
            ValueError, match=f"expected `{argument}` to name one of 'head', .*, got 'fc', which is not in"
        ):
            switch_(Net(nn.Linear(8, 5)), ["a", "b"], **arguments)


def test_a_convolution_of_pixels_is_a_classifier_and_gets_no_switches() -> None:
    plain = Pixels(nn.Conv2d(8, 5, 1)).eval()
    model = switch_(copy.deepcopy(plain), ["a", "b"], heads=SIZES).eval()
    assert type(model.head) is DomainConv2d
    assert type(model.stem) is SwitchedConv2d
    bk.set_domain(model, "a")
    torch.testing.assert_close(model(X)["out"], plain(X)["out"])
    own = model(X)["out"]
    bk.set_domain(model, "b")
    other = model(X)["out"]
    assert other.shape == (2, 7, 8, 8)
    bk.set_domain(model, "a")
    torch.testing.assert_close(model(X)["out"], own)


def test_mixed_batch_pads_classes_of_pixels_with_minus_infinity() -> None:
    model = nn.Sequential(DomainConv2d.from_conv2d(nn.Conv2d(8, 5, 1), SIZES))
    bk.set_domain(model, torch.tensor([1, 0]))
    x = torch.randn(2, 8, 4, 4)
    result = model(x)
    torch.testing.assert_close(result[:1], model[0].domains["b"](x[:1]))
    torch.testing.assert_close(result[1:, :5], model[0].domains["a"](x[1:]))
    assert bool((result[1:, 5:] == -torch.inf).all())


def test_a_squeezenet_like_network_ends_with_a_convolution() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    switch_(model, ["a", "b"], heads=SIZES)
    assert _heads(model) == ["2"]
    for name, size in SIZES.items():
        bk.set_domain(model, name)
        assert model(X).shape == (2, size)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: TwoHeads(nn.Linear(8, 5), nn.Linear(8, 5)), r"got 2: .*'head'.*'extra'|got 2: .*'extra'.*'head'"),
        (lambda: Product(nn.Linear(8, 5), nn.Linear(8, 8)), "product of tensors that no layer computes"),
        (lambda: Branch(nn.Linear(8, 5)), "cannot be recorded"),
    ],
)
def test_ambiguous_classifier_raises_and_changes_nothing(model: Any, message: str) -> None:
    net = model()
    before = dict(net.named_modules())
    with pytest.raises(ValueError, match=message) as caught:
        switch_(net, ["a", "b"], heads=SIZES)
    assert dict(net.named_modules()) == before
    assert "'head'" in str(caught.value)
    assert "Hint: choose with head=" in str(caught.value)
    # Named, it works.
    switch_(net, ["a", "b"], heads=SIZES, head="head")
    assert _heads(net) == ["head"]


def test_two_heads_chosen_by_names_or_a_predicate() -> None:
    for head in (["head", "extra"], lambda module, name: name in ("head", "extra")):
        model = switch_(TwoHeads(nn.Linear(8, 5), nn.Linear(8, 5)), ["a", "b"], heads=SIZES, head=head)
        assert sorted(_heads(model)) == ["extra", "head"]
        bk.set_domain(model, "b")
        assert model(X).shape == (2, 7)
    numbers = {"head": SIZES, "extra": {"b": 7, "a": 5}}
    model = switch_(TwoHeads(nn.Linear(8, 5), nn.Linear(8, 5)), ["a", "b"], heads=numbers)
    assert list(model.extra.domains) == ["a", "b"]
    add_domain_(model, "c", classes={"head": 2, "extra": 2})
    bk.set_domain(model, "c")
    assert model(X).shape == (2, 2)
    add_domain_(model, "d", classes=3)
    bk.set_domain(model, "d")
    assert model(X).shape == (2, 3)
    with pytest.raises(ValueError, match=r"`classes` to name the classifiers \['head', 'extra'\], got \['head'\]"):
        add_domain_(model, "e", classes={"head": 2})


@pytest.mark.parametrize("heads", [True, "head", ["head"], lambda module, name: name == "head"])
def test_without_numbers_every_domain_has_the_classes_of_the_plain_layer(heads: Any) -> None:
    plain = Net(nn.Linear(8, 5)).eval()
    model = switch_(copy.deepcopy(plain), ["a", "b"], heads=heads).eval()
    for name in "ab":
        bk.set_domain(model, name)
        torch.testing.assert_close(model(X), plain(X))
    weights = [one.weight for one in model.head.domains.values()]
    assert weights[0].data_ptr() != weights[1].data_ptr()


def test_a_predicate_is_asked_for_linear_layers_and_pointwise_convolutions() -> None:
    seen = []
    switch_(
        Net(nn.Sequential(nn.Linear(8, 5))), ["a"], heads=lambda module, name: seen.append(name) or name == "head.0"
    )
    assert seen == ["head.0", "down", "up"]


@pytest.mark.parametrize("heads", [None, False])
def test_without_heads_the_classifier_is_shared(heads: Any) -> None:
    model = switch_(Net(nn.Linear(8, 5)), ["a", "b"], heads=heads)
    assert _heads(model) == []
    with pytest.raises(ValueError, match="expected `heads` along with `head`"):
        switch_(Net(nn.Linear(8, 5)), ["a", "b"], heads=heads, head="head")


def test_a_subclass_with_its_own_forward_keeps_it() -> None:
    plain = Net(Cosine(8, 5)).eval()
    model = switch_(copy.deepcopy(plain), ["a", "b"], heads=SIZES).eval()
    bk.set_domain(model, "a")
    torch.testing.assert_close(model(X), plain(X))
    head = model.head.domains["b"]
    assert type(head) is Cosine
    x = torch.randn(2, 8)
    torch.testing.assert_close(head(x), F.linear(F.normalize(x), F.normalize(head.weight), head.bias))
    assert head(x).shape == (2, 7)


def test_a_subclass_with_attributes_of_its_own_is_copied_and_not_resized() -> None:
    plain = Net(Scaled(8, 5)).eval()
    model = switch_(copy.deepcopy(plain), ["a", "b"], heads=True).eval()
    bk.set_domain(model, "b")
    torch.testing.assert_close(model(X), plain(X))
    before = dict(plain.named_modules())
    with pytest.raises(NotImplementedError, match="another number of outputs, got a Scaled"):
        switch_(plain, ["a", "b"], heads=SIZES)
    assert dict(plain.named_modules()) == before


def test_a_computed_weight_is_copied_and_not_resized() -> None:
    make = nn.utils.parametrizations.weight_norm
    model = switch_(Net(make(nn.Linear(8, 5))), ["a", "b"], heads=True)
    own, other = (one.parametrizations.weight.original0 for one in model.head.domains.values())
    assert own.data_ptr() != other.data_ptr()
    with pytest.raises(NotImplementedError, match="got a ParametrizedLinear"):
        switch_(Net(make(nn.Linear(8, 5))), ["a", "b"], heads=SIZES)


def test_hooks_of_the_classifier_see_every_domain() -> None:
    model, seen = Net(nn.Linear(8, 5)), []
    handle = model.head.register_forward_hook(lambda module, args, result: seen.append(module.out_features))
    switch_(model, ["a", "b"], heads=SIZES)
    for name in "ab":
        bk.set_domain(model, name)
        model(X)
    assert seen == [5, 7]
    handle.remove()
    model(X)
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"heads": {"a": 5}}, ValueError, r"`heads` to name the domains \['a', 'b'\], got \['a'\]"),
        ({"heads": {"a": 5, "b": 0}}, ValueError, "at least 1, got 0 for 'b'"),
        ({"heads": {"a": 5, "b": True}}, ValueError, "at least 1, got True for 'b'"),
        ({"heads": {"head": {"a": 5}}}, ValueError, r"`heads` to name the domains \['a', 'b'\], got \['a'\]"),
        ({"heads": {"head": SIZES, "a": 3}}, ValueError, "or {layer: {domain: number}} without `head`"),
        ({"heads": SIZES, "head": "nowhere"}, ValueError, "'nowhere', which is not in the model"),
        ({"heads": SIZES, "head": []}, ValueError, "expected `head` to choose one of 'head', 'down', 'up', got none"),
        ({"heads": SIZES, "head": lambda *_: False}, ValueError, "expected `head` to choose one of"),
        ({"heads": "head", "head": "head"}, ValueError, "to choose the classifier, got both"),
        ({"heads": SIZES, "head": "norm"}, NotImplementedError, "'norm', a BatchNorm2d. Hint: put a"),
        ({"heads": SIZES, "head": ""}, NotImplementedError, "'', a Net"),
    ],
)
def test_unusable_heads_raise_and_change_nothing(options: dict, error: type[Exception], message: str) -> None:
    model = Net(nn.Linear(8, 5))
    before = dict(model.named_modules())
    with pytest.raises(error, match=message):
        switch_(model, ["a", "b"], **options)
    assert dict(model.named_modules()) == before


def test_classifier_with_its_own_forward_raises() -> None:
    model = Net(nn.Linear(8, 5))
    old = model.head.forward
    model.head.forward = lambda x: old(x)
    with pytest.raises(NotImplementedError, match=r"'head', a Linear on which another one was set"):
        switch_(model, ["a", "b"], heads=SIZES)


@pytest.mark.parametrize("assign", [False, True])
def test_dense_checkpoints_give_each_domain_its_own_classifier(assign: bool) -> None:
    for plain in (Net(nn.Linear(8, 5)), Pixels(nn.Conv2d(8, 5, 1))):
        model = switch_(copy.deepcopy(plain), ["a", "b", "c"], heads={"a": 5, "b": 5, "c": 9})
        kept = model.head.domains["c"].weight.detach().clone()
        state = {key: value + 1 for key, value in plain.state_dict().items()}
        model.load_state_dict(state, strict=True, assign=assign)
        a, b, c = (one.weight for one in model.head.domains.values())
        assert torch.equal(a, state["head.weight"])
        assert torch.equal(b, state["head.weight"])
        assert torch.equal(c, kept)
        assert len({a.data_ptr(), b.data_ptr(), state["head.weight"].data_ptr()}) == 3
