"""recompute and recompute_: the same gradients and statistics, fewer bytes kept, no convolution twice."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import bap_kernels as bk
from bap_kernels.nn import recompute, recompute_, switch_
from bap_kernels.nn.recompute import is_recomputed

pytestmark = pytest.mark.usefixtures("aten")


def _part(width: int) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.Conv2d(width, width, 3, padding=1))


class Net(nn.Module):
    """Pre-activation blocks, as of wide residual networks, each part a region if wanted."""

    def __init__(self, parts: int = 4, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 1)
        self.parts = nn.ModuleList(_part(width) for _ in range(parts))
        self.recomputes = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for part in self.parts:
            x = recompute(part, x) if self.recomputes else part(x)
        return x


def _models(ste_every: int = 1) -> tuple[Net, Net]:
    """The same model twice; the second one recomputes."""
    model = switch_(Net(), ["a", "b"], ste_every=ste_every)
    with torch.no_grad():
        for name in ("a", "b"):
            for part in model.parts:
                part[2].domains[name].score.copy_(torch.randn(8) * 0.01 + 5e-3)
    other = copy.deepcopy(model)
    other.recomputes = True
    return model, other


def _same_state(model: nn.Module, other: nn.Module) -> None:
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def _same_gradients(model: nn.Module, other: nn.Module) -> None:
    for (name, one), its in zip(model.named_parameters(), other.parameters(), strict=True):
        assert (one.grad is None) == (its.grad is None), name
        if one.grad is not None:
            torch.testing.assert_close(its.grad, one.grad, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("ste_every", [1, 2, 3])
def test_same_gradients_statistics_and_counters(ste_every: int) -> None:
    model, other = _models(ste_every)
    for step in range(4):
        x = torch.randn(3, 3, 9, 7)
        for one in (model, other):
            bk.set_domain(one, "ab"[step % 2])
            one.zero_grad()
            one(x).square().sum().backward()
        _same_gradients(model, other)
        _same_state(model, other)
    assert model.parts[0][0].domains["a"].num_batches_tracked == 2
    assert [s.since for m in (model, other) for s in m.modules() if isinstance(s, bk.nn.ChannelSwitch)] == [
        2 % ste_every
    ] * 2 * 2 * 5


def test_one_backward_for_the_losses_of_two_domains() -> None:
    model, other = _models()
    x = torch.randn(3, 3, 9, 7)
    for one in (model, other):
        losses = []
        for name in ("a", "b"):
            bk.set_domain(one, name)
            losses.append(one(x).square().sum())
        # Domain and mode by the time of the backward are others.
        bk.set_domain(one, "b")
        one.eval()
        sum(losses).backward()
        assert {layer.domain for _, layer in bk.nn.domain_layers(one)} == {"b"}
        assert not any(module.training for module in one.modules())
    _same_gradients(model, other)
    _same_state(model, other)


class Counter(TorchDispatchMode):
    """Counts the convolutions, forward ones."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        self.forward += name in ("bap_kernels::switched_conv2d", "aten::convolution")
        return function(*args, **(kwargs or {}))


class Watch(TorchDispatchMode):
    """Follows the memory of all results."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for one in results if isinstance(results, (tuple, list)) else (results,):
            if isinstance(one, Tensor):
                storage = one.untyped_storage()
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return results

    def alive(self) -> int:
        """Bytes of results that something still holds."""
        return sum(size for reference, size in self.made.values() if not reference.expired())


def test_keeps_one_tensor_for_each_convolution_and_computes_none_twice() -> None:
    model, other = _models()
    x = torch.randn(3, 3, 9, 7)
    activation = 3 * 8 * 9 * 7 * 4
    # Inputs of four batch norms and of four convolutions; or of the batch norms alone.
    for one, kept in ((model, 8), (other, 4)):
        bk.set_domain(one, "a")
        with Watch() as watch:
            loss = one(x).sum()
        # Switches and the statistics of batches are small.
        assert kept * activation <= watch.alive() < (kept + 0.5) * activation
        with Counter() as counter:
            loss.backward()
        assert counter.forward == 0
    _same_gradients(model, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    model, other = _models()
    x = torch.randn(3, 3, 9, 7)
    for one in (model, other):
        bk.set_domain(one, "a")
        with torch.autocast("cpu", dtype):
            y = one(x)
        assert y.dtype == dtype
        y.float().square().sum().backward()
    _same_gradients(model, other)
    _same_state(model, other)


def test_frozen_weights_and_inputs_without_gradient() -> None:
    model, other = _models()
    x = torch.randn(3, 8, 9, 7)
    for one in (model, other):
        bk.set_domain(one, "a")
        for part in one.parts:
            part[2].weight.requires_grad_(False)
        y = recompute(one.parts[0], x) if one is other else one.parts[0](x)
        y.sum().backward()
    _same_gradients(model, other)
    # Nothing to differentiate, or not now: a plain call.
    with torch.no_grad():
        assert recompute(other.parts[0].eval(), x).grad_fn is None


def test_evaluation_leaves_everything_alone() -> None:
    model, other = _models()
    for one in (model, other):
        bk.set_domain(one.eval(), "b")
    x = torch.randn(2, 3, 9, 7)
    torch.testing.assert_close(other(x), model(x))
    other(x).sum().backward()
    _same_state(model, other)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(x + scale * self.drop(self.bn2(self.conv2(y))))


def _blocks() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 1), Block(), nn.Sequential(Block(), nn.ReLU()))


def _chosen(module: nn.Module, name: str) -> bool:
    return isinstance(module, Block)


def test_blocks_in_place() -> None:
    model = switch_(_blocks(), ["a", "b"])
    other = recompute_(copy.deepcopy(model), _chosen)
    assert list(other.state_dict()) == list(model.state_dict())
    x = torch.randn(3, 3, 9, 7)
    seen = []
    other[1].register_forward_hook(lambda module, inputs, output: seen.append(1))
    for name in ("a", "b"):
        counts = []
        for one in (model, other):
            bk.set_domain(one, name)
            torch.manual_seed(3)
            with Counter() as counter:
                one(x).square().sum().backward()
            counts.append(counter.forward)
        # Batch norm reads the results of all convolutions of the two blocks, so all run again.
        assert counts[0] == 5
        assert counts[1] == 5 + 4
    assert seen == [1, 1]
    _same_gradients(model, other)
    _same_state(model, other)


def test_regions_in_recomputed_blocks_and_two_backwards() -> None:
    model, other = (nn.Sequential(*pair) for pair in zip(_models(), _models(), strict=True))
    other.load_state_dict(model.state_dict())
    model[1].stem = other[1].stem = nn.Identity()
    for net in model:
        net.recomputes = False
    for net in other:
        net.recomputes = True
    recompute_(other, lambda module, name: isinstance(module, Net))
    x = torch.randn(3, 3, 9, 7, requires_grad=True)
    inputs = []
    for one in (model, other):
        bk.set_domain(one, "a")
        loss = one(x).square().mean()
        loss.backward(retain_graph=True)
        loss.backward()
        inputs.append(x.grad)
        x.grad = None
    assert torch.equal(*inputs)
    _same_gradients(model, other)
    _same_state(model, other)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_recompute_on_their_own(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model = recompute_(switch_(_blocks(), ["a"]), _chosen)
    bk.set_domain(model, "a")
    other = duplicate(model)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        other[1].conv1.weight.zero_()
    other(torch.randn(3, 3, 9, 7)).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model[1].conv1.weight.grad is None
    assert other[1].conv1.weight.grad is not None
    assert other[1].forward.module is other[1]


def test_compiles_as_it_is() -> None:
    model, other = _models()
    x = torch.randn(3, 3, 9, 7)
    for one in (model, other):
        bk.set_domain(one, "a")
    torch.compile(other, backend="aot_eager", fullgraph=True)(x).square().sum().backward()
    model(x).square().sum().backward()
    for one, its in zip(model.parameters(), other.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(its.grad, one.grad, rtol=1e-3, atol=1e-3)
    _same_state(model, other)


def test_nothing_chosen_is_an_error() -> None:
    with pytest.raises(ValueError, match="`filter_fn` to choose a module of `model`, got none"):
        recompute_(_blocks(), lambda module, name: False)


@pytest.mark.parametrize("kind", ["switched", "gathered"])
@pytest.mark.parametrize("first", [True, False], ids=["recompute first", "recompute last"])
def test_every_operation_sees_through_it(kind: str, first: bool) -> None:
    """Blocks, and a convolution itself."""
    torch.manual_seed(0)
    model = nn.Sequential(_blocks(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    if first:
        recompute_(model, lambda module, name: _chosen(module, name) or name == "0.0")
    if kind == "switched":
        switch_(model, ["a", "b"])
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("score"):
                    parameter.uniform_(-0.01, 0.02)
    else:
        bk.swap_(model)
        bk.attach_(model, bk.ChannelTable.random(model, ["a", "b"], 0.5, seed=1))
    if not first:
        recompute_(model, lambda module, name: _chosen(module, name) or name == "0.0")
    assert is_recomputed(model[0][0])
    x = torch.randn(2, 3, 9, 7)
    bk.set_domain(model.eval(), "b")
    want = model(x)
    bk.set_domain(model, "a")
    torch.testing.assert_close(bk.plan(model, x, "b")(x), want)
    torch.testing.assert_close(bk.specialize(model, "b")(x), want)
    for change in (bk.order_channels_, bk.prune_unused_) if kind == "gathered" else ():
        other = copy.deepcopy(model)
        change(other)
        bk.set_domain(other, "b")
        torch.testing.assert_close(other(x), want)
        other(x).sum().backward()


def test_a_forward_that_was_set_before_is_kept() -> None:
    model = nn.Sequential(Block(), nn.ReLU())
    calls, old = [], model[0].forward
    model[0].forward = lambda x: calls.append(1) or old(x)
    recompute_(model, _chosen)
    # Once more changes nothing.
    recompute_(model, _chosen)
    model(torch.randn(2, 8, 5, 5)).sum().backward()
    assert calls == [1, 1]
    assert is_recomputed(model[0])
    assert not is_recomputed(model[1])
