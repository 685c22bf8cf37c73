"""Plans find out by themselves when what they copied from the model has changed."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import bap_kernels as bk
from bap_kernels import ChannelLists
from tests.networks import randomise, unit

X = torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _one_backend() -> Iterator[None]:
    with bk.use_backend("aten"):
        yield


class Network(nn.Module):
    """A convolution, a norm by itself, a depthwise and a grouped one, each with a norm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.depthwise, self.norm2 = nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8)
        self.grouped, self.norm3 = nn.Conv2d(8, 8, 3, groups=2), nn.BatchNorm2d(8)
        self.last, self.head = nn.Conv2d(8, 6, 1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.norm2(self.depthwise(x)))
        x = torch.relu(self.norm3(self.grouped(x)))
        return self.head(self.last(x).mean((2, 3)))


def made() -> tuple[nn.Module, nn.Module]:
    """(the swapped model with its first domain set, its plan)."""
    torch.manual_seed(1)
    model = bk.swap_(Network().eval(), lambda module, name: name in ("stem", "last"))
    lists = {"a": {"last": ChannelLists([0, 2, 5])}, "b": {"last": ChannelLists([1, 2, 7])}}
    bk.set_domain(bk.attach_(model, lists), "a")
    for norm in (model.norm, model.norm2, model.norm3):
        nn.init.uniform_(norm.running_var, 0.5, 2)
        nn.init.normal_(norm.running_mean)
    return model, bk.plan(model, X, "a")


def test_hooks_that_are_added_and_removed_are_seen() -> None:
    model, planned = made()
    right(model, planned)
    calls: list[str] = []
    model.norm.register_forward_pre_hook(lambda module, inputs: calls.append("before"))
    handle = model.last.register_forward_hook(lambda module, inputs, result: 2 * result)
    right(model, planned)
    assert calls == ["before"] * len(calls)
    before = len(calls)
    with torch.no_grad():
        planned(X)
    assert len(calls) == before + 1
    handle.remove()
    right(model, planned)


def right(model: nn.Module, planned: nn.Module) -> None:
    with torch.no_grad():
        torch.testing.assert_close(planned(X), model(X), rtol=1e-4, atol=1e-5)


def _train(model: nn.Module) -> None:
    model.train()
    model(3 * X + 1)
    model.eval()


def _fused_step(model: nn.Module) -> None:
    step = torch.optim.AdamW(model.parameters(), 0.1, fused=True)
    model(X).sum().backward()
    step.step()


def _load(model: nn.Module) -> None:
    torch.manual_seed(2)
    model.load_state_dict(Network().state_dict())


def _assign(model: nn.Module) -> None:
    torch.manual_seed(2)
    model.load_state_dict(Network().state_dict(), assign=True)


def _attach(model: nn.Module) -> None:
    bk.set_domain(bk.attach_(model, {"a": {"last": ChannelLists([3, 4])}, "b": {}}), "a")


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "statistics": _train,
    "fused step": _fused_step,
    "checkpoint": _load,
    "assigned checkpoint": _assign,
    "lists": _attach,
    "norm in place": lambda model: model.norm2.weight.data.mul_(2),
    "one statistic by numpy": lambda model: model.norm3.running_mean.numpy().__setitem__(3, 9.0),
    "depthwise filter": lambda model: model.depthwise.weight.data[2].neg_(),
    "grouped filter": lambda model: model.grouped.weight.data[5].neg_(),
    "bias": lambda model: model.depthwise.bias.data.add_(1),
    "new statistics": lambda model: setattr(model.norm, "running_mean", torch.randn(8)),
    "new parameter": lambda model: setattr(model.norm, "bias", nn.Parameter(torch.randn(8))),
    "eps": lambda model: setattr(model.norm, "eps", 0.5),
    "dense filter": lambda model: model.stem.weight.data.mul_(2),
    "head": lambda model: model.head.weight.data.mul_(2),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_of_the_model_are_followed(name: str) -> None:
    model, planned = made()
    right(model, planned)
    for _ in range(2):
        with torch.no_grad():
            before = model(X)
        with torch.set_grad_enabled(name == "fused step"):
            CHANGES[name](model)
        if name not in ("lists", "eps", "checkpoint", "assigned checkpoint", "one statistic by numpy"):
            with torch.no_grad():
                assert not torch.allclose(model(X), before), "the case changes nothing"
        right(model, planned)


def test_an_unchanged_model_is_not_planned_again() -> None:
    model, planned = made()
    program = planned._program
    with torch.no_grad():
        model.stem.weight.mul_(2)
        for _ in range(3):
            right(model, planned)
    assert planned._program is program
    model.norm.bias.data.add_(1)
    right(model, planned)
    assert planned._program is not program


def test_plans_of_other_domains_and_mixed_batches_follow() -> None:
    model, planned = made()
    for name in ("b", "a"):
        bk.set_domain(model, name)
        bk.set_domain(planned, name)
        right(model, planned)
        _load(model) if name == "b" else _train(model)
        right(model, planned)
    bk.set_domain(planned, torch.tensor([1, 0]))
    for change in (lambda: None, lambda: model.norm.running_mean.data.add_(1)):
        change()
        with torch.no_grad():
            expected = []
            for sample, name in zip(X, "ba", strict=True):
                bk.set_domain(model, name)
                expected.append(model(sample[None]))
            torch.testing.assert_close(planned(X), torch.cat(expected), rtol=1e-4, atol=1e-5)
    bk.set_domain(planned, "a")
    right(model, planned)


def test_a_model_that_changed_in_training_mode_raises() -> None:
    model, planned = made()
    model.train()(X)
    with torch.no_grad(), pytest.raises(ValueError, match="eval mode"):
        planned(X)
    model.eval()
    right(model, planned)


def test_many_threads_meet_a_changed_model() -> None:
    model, planned = made()
    model.norm.running_mean.add_(1)
    with torch.no_grad():
        expected = model(X)
    got: list[Tensor] = []

    def call() -> None:
        with torch.no_grad(), bk.use_backend("aten"):
            got.append(planned(X))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 4
    for result in got:
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


def test_switches_of_a_planned_model() -> None:
    model = bk.nn.switch_(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)), ["a"]).eval()
    bk.set_domain(model, "a")
    try:
        planned = bk.plan(model, X, "a")
    except (ValueError, NotImplementedError):
        pytest.skip("switched layers are refused by plans")
    right(model, planned)
    model[2].domains["a"].score.data[3] = 0
    right(model, planned)


@torch.no_grad()
def test_scales_without_an_axis() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.gain = nn.Conv2d(3, 4, 1), nn.Parameter(torch.tensor(2.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x) * self.gain

    model, x = Scaled().eval(), torch.randn(1, 3, 5, 5)
    planned = bk.plan(model, x)
    model.gain.mul_(3)
    torch.testing.assert_close(planned(x), model(x))


def test_a_domain_that_is_set_while_the_model_differs_is_planned_again_afterwards() -> None:
    """All plans that are kept are of one state of the model, whichever was current when a domain was first set."""
    model = bk.swap_(randomise(nn.Sequential(unit(3, 8), nn.Conv2d(8, 4, 1))))
    bk.attach_(model, bk.ChannelTable.random(model, ["a", "b"], 0.5))
    x = torch.randn(2, 3, 8, 8)
    planned = bk.plan(model, x, "a")
    norm = model[0][1]
    with torch.no_grad():
        norm.bias += 1
        bk.set_domain(planned, "b")  # planned for the first time, with other numbers
        norm.bias -= 1
        bk.set_domain(model, "b")
        torch.testing.assert_close(planned(x), model(x))
        bk.set_domain(planned, "a")
        bk.set_domain(model, "a")
        torch.testing.assert_close(planned(x), model(x))


def test_a_model_that_holds_its_plan_is_collected() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).eval()
    bk.swap_(model)
    model.planned = [bk.plan(model, torch.randn(1, 4, 3, 3))]
    model.planned[0](torch.randn(1, 4, 3, 3))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
