"""Checkpointing: forwards that a backward computes again count once, and another domain in between is refused."""

from __future__ import annotations

import concurrent.futures
import copy
import functools
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bap_kernels as bk


def plain(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return function(x)


WAYS: dict[str, Callable[..., Tensor]] = {
    "whole": functools.partial(checkpoint, use_reentrant=False),
    "no early stop": functools.partial(checkpoint, use_reentrant=False, early_stop=False),
    "reentrant": functools.partial(checkpoint, use_reentrant=True),
    "ours": bk.nn.recompute,
}


def around(outer: str, inner: str) -> Callable[[nn.Module, Tensor], Tensor]:
    """A checkpoint in a checkpoint; ours takes modules."""

    class Inner(nn.Module):
        def __init__(self, part: nn.Module) -> None:
            super().__init__()
            self.part = part

        def forward(self, x: Tensor) -> Tensor:
            return WAYS[inner](self.part, x)

    return lambda part, x: WAYS[outer](Inner(part), x)


NESTED = {f"{inner} in {outer}": around(outer, inner) for outer in WAYS for inner in WAYS}
ALL = WAYS | NESTED


def model_of(ste_every: int) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
    model = bk.nn.switch_(model, ["a", "b"], ste_every=ste_every)
    with torch.no_grad():
        for layer in (model[0], model[2]):
            for name in "ab":
                layer.domains[name].score.copy_(torch.randn(4) * 0.01 + 5e-3)
            layer.domains["a"].score[1] = 0
            layer.domains["b"].score[2] = 0
    bk.set_domain(model, "a")
    return model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-4, msg=name)


def steps(way: Callable, ste_every: int, forwards: int, retain: bool) -> list[dict[str, Tensor]]:
    """Gradients of some steps, each a backward through several forwards of two checkpointed parts."""
    model, found = model_of(ste_every), []
    for step in range(3):
        model.zero_grad()
        loss = torch.zeros(())
        for number in range(forwards):
            torch.manual_seed(10 * step + number)
            x = torch.randn(2, 4, 6, 6, requires_grad=True)
            # Forwards of no step do not count.
            with torch.no_grad():
                model(x)
            loss = loss + (number + 1) * way(model[2], way(model[0], x).relu()).square().sum()
        if retain:
            loss.backward(retain_graph=True)
        loss.backward()
        found.append(gradients(model))
    return found


@pytest.mark.parametrize("retain", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize(("ste_every", "forwards"), [(2, 1), (3, 2), (2, 3)])
@pytest.mark.parametrize("way", ALL)
def test_a_recomputed_forward_decides_as_its_first_one(way: str, ste_every: int, forwards: int, retain: bool) -> None:
    for got, want in zip(
        steps(ALL[way], ste_every, forwards, retain), steps(plain, ste_every, forwards, retain), strict=True
    ):
        same(got, want)


def test_evaluation_and_forwards_without_gradient_do_not_count() -> None:
    layer = model_of(3)[0]
    switch = layer.domains["a"]
    x = torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        for way in WAYS.values():
            way(layer, x.clone().requires_grad_())
        layer(x)
    layer.eval()(x)
    layer.train()
    assert switch.since == 0
    layer(x)
    assert switch.since == 1


def test_compiled_counts() -> None:
    model, other = model_of(2), model_of(2)
    compiled = torch.compile(other, backend="aot_eager")
    x = torch.randn(2, 4, 6, 6)
    for _ in range(4):
        for one, call in ((model, model), (other, compiled)):
            one.zero_grad()
            call(x).square().sum().backward()
        same(gradients(other), gradients(model))


TORCHS = {name: way for name, way in ALL.items() if "ours" not in name}


@pytest.mark.parametrize("change", ["name", "none", "numbers", "layer"])
@pytest.mark.parametrize("way", TORCHS)
def test_another_domain_before_the_backward_raises(way: str, change: str) -> None:
    model, x = model_of(1), torch.randn(2, 4, 6, 6, requires_grad=True)
    loss = TORCHS[way](model, x).square().sum()
    if change == "layer":
        model[0].set_domain("b")
    else:
        bk.set_domain(model, {"name": "b", "none": None, "numbers": torch.tensor([0, 1])}[change])
    with pytest.raises(RuntimeError, match="expected the domain of the first forward when checkpointing computes it"):
        loss.backward()


@pytest.mark.parametrize("way", TORCHS)
def test_losses_of_two_domains_raise(way: str) -> None:
    model, x = model_of(1), torch.randn(2, 4, 6, 6, requires_grad=True)
    losses = []
    for name in "ab":
        bk.set_domain(model, name)
        losses.append(TORCHS[way](model, x).square().sum())
    with pytest.raises(RuntimeError, match="expected the domain of the first forward"):
        sum(losses).backward()


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "switched": lambda: bk.nn.SwitchedConv2d(4, 4, 3, domains=["a", "b"]),
    "norm": lambda: bk.nn.DomainBatchNorm2d(4, ["a", "b"]),
    "linear": lambda: bk.nn.DomainLinear(6, {"a": 3, "b": 3}),
    "gathered": lambda: bk.attach_(
        nn.Sequential(bk.nn.GatheredConv2d(4, 4, 3)),
        {"a": {"0": bk.ChannelLists([0])}, "b": {"0": bk.ChannelLists([1])}},
    ),
    "masked": lambda: bk.attach_(
        nn.Sequential(bk.nn.MaskedConv2d(4, 4, 3)),
        {"a": {"0": bk.ChannelLists([0])}, "b": {"0": bk.ChannelLists([1])}},
    ),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("way", ["whole", "reentrant", "reentrant in reentrant", "whole in reentrant"])
def test_every_layer_raises_for_another_domain(way: str, kind: str, training: bool) -> None:
    model, x = LAYERS[kind]().train(training), torch.randn(2, 4, 6, 6, requires_grad=True)
    bk.set_domain(model, "a")
    loss = TORCHS[way](nn.Sequential(model, nn.ReLU()), x).square().sum()
    bk.set_domain(model, "b")
    with pytest.raises(RuntimeError, match="expected the domain of the first forward"):
        loss.backward()
    # The next step is as ever.
    TORCHS[way](nn.Sequential(model, nn.ReLU()), x).square().sum().backward()


@pytest.mark.parametrize("way", ALL)
def test_one_backward_per_domain_in_turn(way: str) -> None:
    model, other = model_of(1), model_of(1)
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    for name in ("a", "b", "b", "a", torch.tensor([1, 0]), torch.tensor([0, 1]), None, "b"):
        for one, call in ((model, plain), (other, ALL[way])):
            one.zero_grad()
            bk.set_domain(one, name)
            loss = call(one, x).square().sum()
            # The same one again changes nothing.
            if not isinstance(name, Tensor):
                bk.set_domain(one, name)
            loss.backward()
        same(gradients(other), gradients(model))


@pytest.mark.parametrize("way", TORCHS)
def test_a_domain_that_was_set_in_another_thread(way: str) -> None:
    model, other = model_of(1), model_of(1)
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    for _ in range(20):
        # Nodes of this thread.
        x.sin()
    for one in (model, other):
        bk.set_domain(one, "b")
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        for one, call in ((model, plain), (other, TORCHS[way])):
            thread.submit(lambda one=one, call=call: call(one, x).square().sum().backward()).result()
    same(gradients(other), gradients(model))


def test_unpickled_layers_forget_when_the_domain_changed() -> None:
    model = pickle.loads(pickle.dumps(model_of(1)))
    for layer in (model[0], model[2]):
        assert "_changed" not in layer.__dict__


@pytest.mark.parametrize("way", TORCHS)
def test_a_function_that_sets_the_domain_itself(way: str) -> None:
    def both(model: nn.Module, x: Tensor) -> Tensor:
        bk.set_domain(model, "a")
        y = model(x)
        bk.set_domain(model, "b")
        return y + model(x * 2)

    class Both(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return both(self.model, x)

    model, other = model_of(1), model_of(1)
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    for one, call in ((model, plain), (other, TORCHS[way])):
        loss = call(Both(one), x).square().sum()
        bk.set_domain(one, "a")
        loss.backward()
    same(gradients(other), gradients(model))


@pytest.mark.parametrize("way", ["ours", "ours in ours"])
def test_recompute_remembers_domains_and_batches(way: str) -> None:
    model, other = model_of(1), model_of(1)
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    names = ["a", torch.tensor([1, 0]), "b", None, torch.tensor([0, 0])]
    for one, call in ((model, plain), (other, ALL[way])):
        losses = []
        for name in names:
            bk.set_domain(one, name)
            losses.append(call(one, x).square().sum())
        bk.set_domain(one, torch.tensor([1, 1]))
        sum(losses).backward()
        assert one[0]._mixed.batch.counts == [2]
    same(gradients(other), gradients(model))


@pytest.mark.parametrize("ours", ["ours", "whole"])
def test_recompute_inside_a_checkpoint_of_another_domain_raises(ours: str) -> None:
    model, x = model_of(1), torch.randn(2, 4, 6, 6, requires_grad=True)

    class Regions(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return WAYS[ours](model[2], WAYS[ours](model[0], x).relu())

    loss = checkpoint(Regions(), x, use_reentrant=False).square().sum()
    bk.set_domain(model, "b")
    with pytest.raises(RuntimeError, match="expected the domain of the first forward"):
        loss.backward()


def test_consumers_outside_of_a_region_are_remembered() -> None:
    found = []
    for call in (plain, bk.nn.recompute):
        model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
        torch.manual_seed(1)
        for p in model.parameters():
            nn.init.normal_(p)
        model = bk.nn.switch_(model, ["a", "b"])
        bk.nn.link_readers_(model)
        with torch.no_grad():
            model[1].domains["a"].score[:2] = 0
            model[1].domains["b"].score[2:] = 0
        bk.set_domain(model, "a")
        torch.manual_seed(2)
        x = torch.randn(2, 4, 6, 6, requires_grad=True)
        loss = model[1](call(model[0], x)).square().sum()
        bk.set_domain(model, "b")
        loss.backward()
        found.append(gradients(model))
    same(found[1], found[0])


@pytest.mark.parametrize("training", [True, False])
def test_mixed_batch_norm_statistics_change_once(training: bool) -> None:
    model = bk.nn.switch_(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1)), ["a", "b"]).train(training)
    other = bk.nn.recompute_(copy.deepcopy(model), lambda module, name: name == "0")
    x = torch.randn(4, 4, 6, 6, requires_grad=True)
    for one in (model, other):
        bk.set_domain(one, torch.tensor([0, 1, 1, 0]))
        loss = one(x).square().sum()
        bk.set_domain(one, "a")
        loss.backward()
    same(gradients(other), gradients(model))
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    assert model[0].domains["b"].num_batches_tracked == int(training)
