"""Recording a model: plans and small networks do what its own code does on an example, or refuse."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bap_kernels as bk
from bap_kernels.plan.compare import largest_error

Pair = namedtuple("Pair", "first second")


@dataclasses.dataclass
class Out:
    y: Tensor
    count: int = 3


class Net(nn.Module):
    """Two convolutions, called by a function that a test gives."""

    def __init__(self, code: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.c, self.d, self.code = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), code
        self.scale = nn.Parameter(torch.randn(8, 1, 1))

    def forward(self, x: Any, *rest: Any, **named: Any) -> Any:
        return self.code(self, x, *rest, **named)


def network(code: Callable[..., Any], inside: bool = False) -> nn.Module:
    """A swapped network with lists of two domains; ``inside``: the code is a submodule's."""
    model: nn.Module = Net(code)
    model = nn.Sequential(model, nn.Identity()) if inside else model
    model = bk.swap_(model.eval())
    return bk.attach_(model, bk.ChannelTable.random(model, ["a", "b"], 0.5, 1))


def image(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 3, 8, 8)), generator=torch.Generator().manual_seed(1))


def run(model: nn.Module, domain: str, *inputs: Any) -> Any:
    """What the model itself returns in a domain."""
    bk.set_domain(model, domain)
    with torch.no_grad():
        return model(*copy.deepcopy(inputs))


def made(model: nn.Module, domain: str, example: tuple[Any, ...]) -> dict[str, Callable[..., Any]]:
    return {
        "plan": bk.plan(model, example, domain),
        "plan, unchecked": bk.plan(model, example, domain, check=False),
        "specialize": bk.specialize(model, domain, example),
    }


def assert_kept(model: nn.Module, *example: Any, others: tuple[tuple[Any, ...], ...] = ()) -> None:
    """Every way of running the network returns what the model returns, whatever domain the model is set to."""
    for domain, active in (("a", "b"), ("b", "b")):
        bk.set_domain(model, active)
        found = made(model, domain, example)
        for inputs in (example, *others):
            want = run(model, domain, *inputs)
            for name, one in found.items():
                with torch.no_grad():
                    assert largest_error(one(*copy.deepcopy(inputs)), want)[0] < 1e-5, (name, domain, active)


def attention(net: Net, x: Tensor) -> Tensor:
    y = net.c(x)
    B, C, H, W = y.shape
    flat = y.reshape(B, C, H * W).transpose(1, 2)
    assert flat.dim() == 3
    return net.d((flat @ flat.transpose(1, 2) @ flat / (H * W)).reshape(B, H, W, C).permute(0, 3, 1, 2))


def sliced(net: Net, x: Tensor) -> Tensor:
    y = net.c(x)
    up = F.interpolate(F.avg_pool2d(y, 2), scale_factor=2)
    up = F.pad(up, (0, y.shape[3] - up.shape[3], 0, y.size(2) - up.size(2)))
    return net.d(y + up[:, :, : y.shape[2], : y.shape[3]])


CODES: dict[str, Callable[..., Any]] = {
    "kinds": lambda net, x: (
        net.d(net.c(x)) if isinstance(x, Tensor) and torch.is_tensor(x) and type(x) is Tensor else x
    ),
    "exact kind": lambda net, x: net.d(net.c(x)) if type(net.c(x)) is torch.Tensor else x,
    "width": lambda net, x: net.d(net.c(x)) if x.shape[1] == 3 and x.size(1) == 3 else x,
    "list": lambda net, x: torch.cat([torch.relu(y) for y in list(net.c(x).chunk(2, 1))], 1),
    "sizes": lambda net, x: net.d(net.c(x)) * x.shape[0] / x.shape[2] + x.size(3) ** 2 - len(x.shape),
    "attention": attention,
    "slices": sliced,
    "resized": lambda net, x: net.d(F.interpolate(F.max_pool2d(net.c(x), 2), size=x.shape[-2:])),
    "made in forward": lambda net, x: nn.Softmax(dim=1)(net.c(x)),
    "dictionary": lambda net, x: OrderedDict(first=net.c(x), more=[net.d(net.c(x))]),
    "namedtuple": lambda net, x: Pair(net.c(x), net.d(net.c(x))),
    "dataclass": lambda net, x: Out(net.d(net.c(x))),
    "parameter": lambda net, x: net.d(net.c(x) * net.scale) * torch.ones(1, 8, 1, 1, device=x.device),
    "reversed": lambda net, x: 1 - net.d(2 / (3 + net.c(x).square())),
}


@pytest.mark.parametrize("name", CODES)
def test_plans_compute_what_the_code_computes(name: str) -> None:
    others = ((image(1, 3, 8, 8),), (image(3, 3, 13, 11),), (image(2, 3, 6, 16),))
    assert_kept(network(CODES[name]), image(), others=others)


def through(view: Callable[[Tensor], Tensor], write: Callable[[Tensor], Any]) -> Callable[..., Any]:
    """A view is made, the whole is written to, the view is read."""

    def code(net: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        y = net.c(x)
        shown = view(y)
        write(y)
        return shown * 2, net.d(y)

    return code


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "slice": lambda y: y[:, :, ::2, ::2],
    "chunk": lambda y: y.chunk(2, 1)[1],
    "view": lambda y: y.view(y.size(0), -1),
    "permute": lambda y: y.permute(0, 2, 3, 1)[..., 1:],
    "detach": lambda y: y.detach(),
    "contiguous": lambda y: y.contiguous(),
    "data": lambda y: y.data,
    "identity": nn.Identity(),
}
WRITES: dict[str, Callable[[Tensor], Any]] = {
    "relu": lambda y: F.relu(y, inplace=True),
    "layer": nn.ReLU(inplace=True),
    "method": lambda y: y.mul_(2),
    "operator": lambda y: y.__iadd__(1.5),
    "item": lambda y: y.__setitem__((slice(None), 0), 7.0),
    "out": lambda y: torch.add(y, 1, out=y),
    "copy": lambda y: y.copy_(y.flip(2)),
    "index": lambda y: y.index_put_((torch.tensor([0]), torch.tensor([1])), torch.tensor(5.0)),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("view", VIEWS)
def test_views_show_what_is_written_afterwards(view: str, write: str) -> None:
    assert_kept(network(through(VIEWS[view], WRITES[write])), image())


PARTS: dict[str, Callable[[Tensor], Any]] = {
    "slice": lambda y: y[:, :, ::2].relu_(),
    "first": lambda y: y[0].mul_(3),
    "chunk": lambda y: F.relu(y.chunk(2, 1)[0], inplace=True),
    "permute": lambda y: y.permute(0, 2, 3, 1)[..., 1:].add_(1),
    "out": lambda y: torch.add(y[:, :2], 1, out=y[:, 2:4]),
}


@pytest.mark.parametrize("write", PARTS)
def test_writes_to_a_part_are_run_as_they_are_or_refused(write: str) -> None:
    def code(net: Net, x: Tensor) -> Tensor:
        y = net.c(x)
        PARTS[write](y)
        return net.d(y)

    # The module around it is run as it is; the model's own forward cannot be.
    assert_kept(network(code, inside=True), image())
    model = network(code)
    for call in (bk.plan, functools.partial(bk.plan, check=False)):
        with pytest.raises(ValueError, match=r"plan\(\): expected `model` to be recordable, got Net, .* writes to "):
            call(model, image(), "a")


def test_a_write_to_an_input_of_a_module_is_seen_outside() -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.relu_().sum((2, 3), keepdim=True) if x.sum() < 1e9 else x

    writes = Writes()
    writes.eval()

    def code(net: Net, x: Tensor) -> Tensor:
        y = net.c(x)
        return writes(y) + net.d(y)

    model = network(code, inside=True)
    model[0].writes = writes
    assert_kept(model, image())
    x = image()
    before = x.clone()
    bk.plan(network(lambda net, x: net.d(net.c(x.mul_(2)))), x, "a")(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("flag", [True, False, None, "yes", 3, [1, "a"]], ids=repr)
def test_flags_are_those_of_the_example(flag: Any) -> None:
    def code(net: Net, x: Tensor, flag: Any = None) -> Tensor:
        y = net.c(x)
        if flag is True or flag == 3:
            y = torch.relu(y)
        return y if flag is None else net.d(y)

    model = network(code)
    assert_kept(model, image(), flag)
    assert_kept(model, image())
    planned = bk.plan(model, (image(), flag), "a")
    with pytest.raises(ValueError, match=r"expected .* for an input that is no tensor, as in the example, got 'other'"):
        planned(image(), "other")
    with pytest.raises(ValueError, match="expected a tensor where the example has one, got NoneType"):
        planned(None, flag)


def test_inputs_in_lists_and_dictionaries() -> None:
    def code(net: Net, x: Tensor, more: list[Tensor], named: dict[str, Tensor]) -> Tensor:
        return net.d(net.c(x)) + more[0].mean() + len(more) + named["bias"]

    others = ((image(3, 3, 8, 8), [image(1, 2), image(2, 2)], {"bias": torch.tensor(2.0)}),)
    assert_kept(network(code), image(), [image(4, 4), image(2, 2)], {"bias": torch.tensor(1.0)}, others=others)


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "branch": (lambda net, x: net.c(x) if x.sum() > 0 else x, "it reads numbers out of a tensor"),
    "item": (lambda net, x: net.c(x) * x.sum().item(), "it reads numbers out of a tensor"),
    "loop": (lambda net, x: sum(net.c(x) for _ in range(x.shape[0])), "it counts to a number that depends on the size"),
    "size": (lambda net, x: net.c(x) if x.shape[2] > 4 else x, "it branches on a number that depends on the size"),
    "key": (lambda net, x: net.c(x) * {8: 2}.get(x.shape[2], 1), "it looks up a number that depends on the size"),
    "samples": (lambda net, x: torch.cat([net.c(one) for one in x.split(1)]), "takes other steps for another input"),
    "numpy": (lambda net, x: net.c(x) + torch.from_numpy(np.ones(1, np.float32)), "made out of sight"),
    "object": (
        lambda net, x: type("Any", (), {})() if setattr(net, "kept", net.c(x)) else Held(net.c(x)),
        "returns a Held",
    ),
    "buffer": (lambda net, x: net.c(x) + net.scale.data.mul_(1), "writes to a parameter"),
    "autocast": (lambda net, x: within_autocast(net, x), "it changes autocast"),
}


class Held:
    """Something that holds a tensor."""

    def __init__(self, y: Tensor) -> None:
        self.y = y


def within_autocast(net: Net, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return net.c(x)


@pytest.mark.parametrize("name", REFUSED)
def test_unrecordable_models_raise(name: str) -> None:
    code, reason = REFUSED[name]
    for call in (bk.plan, lambda model, x, domain: bk.specialize(model, domain, x)):
        with pytest.raises(ValueError, match=rf"\(\): expected `model` to be recordable, got .*{reason}"):
            call(network(code), image(), "a")


@pytest.mark.parametrize("name", [name for name in REFUSED if name not in ("object", "buffer", "autocast")])
def test_unrecordable_submodules_become_one_step(name: str) -> None:
    model = network(REFUSED[name][0], inside=True)
    others = ((image(3, 3, 8, 8),), (image(2, 3, 4, 4),)) if name != "numpy" else ()
    assert_kept(model, image(), others=others)


def test_plans_ignore_a_mixed_batch_of_the_model() -> None:
    model = network(CODES["width"])
    want = run(model, "a", image())
    bk.set_domain(model, torch.tensor([1, 0]))
    mixed = model(image())
    for one in made(model, "a", (image(),)).values():
        assert largest_error(one(image()), want)[0] < 1e-5
    assert torch.equal(model(image()), mixed)


def test_random_numbers_are_drawn_anew() -> None:
    model = network(lambda net, x: net.d(net.c(x)) + torch.rand(1))
    state = torch.get_rng_state()
    planned = bk.plan(model, image(), "a")
    assert not torch.equal(planned(image()), planned(image()))
    bk.specialize(model, "a", image())
    assert torch.get_rng_state().shape == state.shape


class Cached(nn.Module):
    """Keeps what it computed, in every place that a forward can reach."""

    def __init__(self) -> None:
        super().__init__()
        self.bias, self.cache, self.seen = nn.Parameter(torch.randn(8)), {}, []
        self.helper = Held(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        if "bias" not in self.cache:
            self.cache["bias"] = self.bias[list(range(8))]
        self.last = x
        self.size = x.shape[2]
        self.seen.append(x.shape)
        self.helper.y = x
        return x + self.cache["bias"].view(1, -1, 1, 1)


def test_recording_leaves_nothing_in_the_model() -> None:
    model = network(lambda net, x: net.d(net.cached(net.c(x))))
    model.cached = Cached()
    model.eval()
    for call in (bk.plan, bk.prune_unused_, bk.order_channels_, lambda model, x: bk.specialize(model, "a", x)):
        call(model, image())
        assert not model.cached.cache
        assert not model.cached.seen
        assert not hasattr(model.cached, "size")
        assert model.cached.helper.y.shape == (1,)
        copy.deepcopy(model)
    assert_kept(model, image())


def changed_in_place(model: nn.Module, *example: Tensor) -> None:
    before = {name: run(model, name, image()) for name in ("a", "b")}
    for call in (bk.prune_unused_, bk.order_channels_):
        call(model, *example)
        for name, want in before.items():
            assert largest_error(run(model, name, image()), want)[0] < 1e-5


@pytest.mark.filterwarnings("ignore:prune_unused_")
@pytest.mark.parametrize("name", [*CODES, *VIEWS])
def test_pruning_and_ordering_keep_results(name: str) -> None:
    changed_in_place(network(CODES[name] if name in CODES else through(VIEWS[name], WRITES["relu"])), image())


@pytest.mark.filterwarnings("ignore:prune_unused_")
@pytest.mark.parametrize("name", ["exact kind", "list", "contiguous"])
def test_without_an_example(name: str) -> None:
    code = CODES[name] if name in CODES else through(VIEWS[name], WRITES["relu"])
    model = network(code)
    assert largest_error(bk.specialize(model, "a")(image()), run(model, "a", image()))[0] < 1e-5
    changed_in_place(model)
