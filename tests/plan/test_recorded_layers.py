"""Layers that a recording meets: with a forward of their own, hooked, recomputed, made in forward, of other threads."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bap_kernels as bk
from bap_kernels.plan.compare import largest_error
from tests.plan.test_recording import VIEWS, WRITES, Net, assert_kept, image, network, run, through


def accelerated(module: nn.Module) -> None:
    """As accelerate's hooks are set."""
    old = module.forward
    module._old_forward = old

    def new(this: nn.Module, *args: Any) -> Any:
        return this._old_forward(*args) * 2

    module.forward = functools.update_wrapper(functools.partial(new, module), old)


def closed(module: nn.Module) -> None:
    old = module.forward
    module.forward = lambda *args: old(*args) * 2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.n = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.n(self.c(x)))


def blocks() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Block(), nn.Conv2d(8, 4, 1)).eval()
    return bk.attach_(bk.swap_(model), bk.ChannelTable.random(model, ["a", "b"], 0.5, 1))


@pytest.mark.parametrize("own", [accelerated, closed])
@pytest.mark.parametrize("place", ["1", "1.c", "1.n"])
def test_a_forward_of_an_instance_is_called_in_the_plans_domain(own: Callable[..., None], place: str) -> None:
    model = blocks()
    own(model.get_submodule(place))
    for domain, active in (("a", "b"), ("b", "b"), ("b", None)):
        want = run(model, domain, image())
        bk.set_domain(model, active)
        before = model[1].c.channels
        assert largest_error(bk.plan(model, image(), domain)(image()), want)[0] < 1e-5
        assert largest_error(bk.plan(model, image(), domain, check=False)(image()), want)[0] < 1e-5
        assert model[1].c.channels is before
        if place == "1.n" or (own is accelerated and place == "1"):
            assert largest_error(bk.specialize(model, domain, image())(image()), want)[0] < 1e-5
        else:
            with pytest.raises(NotImplementedError, match="with another function in its place"):
                bk.specialize(model, domain, image())


def test_layers_that_a_copy_does_not_reach_raise() -> None:
    model = blocks()
    conv = model[1].c

    class Outside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c, self.call = conv, lambda x: conv(x)

        def forward(self, x: Tensor) -> Tensor:
            return self.call(x)

    model[1] = Outside().eval()
    for call in (bk.plan, functools.partial(bk.plan, check=False), lambda m, x, d: bk.specialize(m, d, x)):
        with pytest.raises(ValueError, match=r"\(\): expected a copy of `model` to compute what it computes in domain"):
            call(model, image(), "a")


def test_hooks_of_containers_run_each_time() -> None:
    model, seen = blocks(), []
    model[1].register_forward_hook(lambda module, args, y: seen.append(1) or y + 1)
    assert_kept(model, image())
    planned = bk.plan(model, image(), "a")
    seen.clear()
    planned(image())
    assert seen == [1]


def test_recomputed_blocks_are_seen_through() -> None:
    model = bk.nn.switch_(nn.Sequential(nn.Conv2d(3, 8, 3), Block()), ["a", "b"])
    bk.nn.recompute_(model, lambda module, name: name == "1")
    model = bk.swap_(model.eval())
    assert_kept(model, image())
    planned = bk.plan(model, image(), "a")
    assert "opaque" not in [step.kind for step in planned._program.steps]


class Loop(threading.Thread):
    """Calls modules that a recording has nothing to do with."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Softmax(dim=1), nn.Sequential(nn.Linear(8, 8))).eval()
        self.want = self.model(image())
        self.started, self.stop, self.wrong, self.calls = threading.Event(), threading.Event(), [], 0

    def run(self) -> None:
        while not self.stop.is_set():
            try:
                if not torch.equal(self.model(image()), self.want):
                    self.wrong.append("another result")
                self.model[0].weight.mean()
            except Exception as error:
                self.wrong.append(error)
            self.calls += 1
            self.started.set()


def test_other_threads_see_nothing_of_a_recording() -> None:
    call, get = nn.Module.__call__, nn.Module.__getattr__
    other = Loop()
    other.start()
    other.started.wait()
    try:
        model = network(through(VIEWS["chunk"], WRITES["relu"]), inside=True)
        before = other.calls
        while other.calls < before + 20 and not other.wrong:
            bk.plan(model, image(), "a")
            bk.specialize(model, "b", image())
            bk.nn.switch_(nn.Sequential(nn.Conv2d(3, 4, 1), Block()), ["a"])
            assert (nn.Module.__call__, nn.Module.__getattr__) == (call, get)
    finally:
        other.stop.set()
        other.join()
    assert not other.wrong


@pytest.mark.parametrize(
    "layer", [lambda: nn.Softmax(dim=1), lambda: nn.Conv2d(8, 8, 1), lambda: nn.BatchNorm2d(8).eval()]
)
def test_layers_made_in_forward_do_not_loop(layer: Callable[[], nn.Module]) -> None:
    code = lambda net, x: net.d(net.c(x)) + layer()(net.c(x)) * 0  # noqa: E731
    calls: list[Callable[[nn.Module], Any]] = [
        lambda model: bk.plan(model, image(), "a"),
        lambda model: bk.specialize(model, "a", image()),
        lambda model: bk.prune_unused_(model, image()),
        lambda model: bk.order_channels_(model, image()),
    ]
    for inside in (False, True):
        for call in calls:
            with contextlib.nullcontext() if inside else contextlib.suppress(ValueError):
                call(network(code, inside))
        bk.nn.switch_(Net(code), ["a", "b"])
