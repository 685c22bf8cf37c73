"""Mixed batches of planned networks: every part of the result is joined rightly, or an error names what cannot be."""

from __future__ import annotations

import collections
import copy
from collections import OrderedDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bap_kernels as bk
from bap_kernels.nn.mixed import MixedBatch
from bap_kernels.plan.mixed import MixedPlans
from bap_kernels.plan.program import Program

NUMBERS = torch.tensor([1, 0, 0, 1, 1])


class Pair(NamedTuple):
    first: Tensor
    second: Any


class Net(nn.Module):
    """A convolution, and a function that turns its result into what the model returns."""

    def __init__(self, finish: Callable[[Any, Tensor], Any] = lambda net, y: y) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding=1)
        self.finish = finish
        self.register_buffer("table", torch.arange(5.0))

    def forward(self, x: Tensor) -> Any:
        return self.finish(self, self.conv(x))


def two_domains(model: nn.Module) -> nn.Module:
    lists = {"a": {"conv": bk.ChannelLists([0])}, "b": {"conv": bk.ChannelLists([1])}}
    return bk.attach_(bk.swap_(model.eval()), lists)


def masked(model: nn.Module, x: Tensor, numbers: Tensor = NUMBERS) -> Tensor:
    one = torch.zeros(len(x), 3, 1, 1)
    one[torch.arange(len(x)), numbers] = 1
    return F.conv2d(x * one, model.conv.weight, model.conv.bias, padding=1)


RESULTS: dict[str, tuple[Callable[[Any, Tensor], Any], Callable[[Any], Tensor]]] = {
    "tensor": (lambda net, y: y, lambda r: r),
    "nested": (lambda net, y: {"features": [y, (y.mean((2, 3)),)], "size": 3}, lambda r: r["features"][0]),
    "ordered dict": (lambda net, y: OrderedDict(out=y, aux=y.relu()), lambda r: r["out"]),
    "namedtuple": (lambda net, y: Pair(y.relu(), [y]), lambda r: r.second[0]),
    # As many channels as samples.
    "channels first": (lambda net, y: y.transpose(0, 1), lambda r: r.transpose(0, 1)),
    "pixels first": (lambda net, y: y.permute(2, 3, 0, 1), lambda r: r.permute(2, 3, 0, 1)),
    "with a constant": (lambda net, y: (y, net.table), lambda r: r[0]),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", RESULTS)
@pytest.mark.parametrize("numbers", [NUMBERS, torch.tensor([0, 0, 1]), torch.tensor([1, 0]), torch.tensor([1, 1])])
def test_results_are_joined_in_the_callers_order(kind: str, numbers: Tensor) -> None:
    finish, found = RESULTS[kind]
    model, x = two_domains(Net(finish)), torch.randn(len(numbers), 3, 4, 6)
    planned = bk.plan(model, torch.randn(1, 3, 4, 6), "a")
    bk.set_domain(planned, numbers)
    for _ in range(2):
        result = planned(x)
        torch.testing.assert_close(found(result), masked(model, x, numbers))
    if kind == "with a constant":
        assert torch.equal(result[1], model.table)


REFUSED: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "sum": (lambda net, y: {"y": y, "loss": y.sum()}, r"no axis that counts the samples.* at \"output\['loss'\]\""),
    "mean of the batch": (lambda net, y: (y, y.mean(0)), r"no axis that counts the samples.* at 'output\[1\]'"),
    "flat": (lambda net, y: y.flatten(), "no axis that counts the samples"),
    "pairs": (lambda net, y: y.mean((2, 3)) @ y.mean((2, 3)).t(), "no axis that counts the samples"),
    "size": (lambda net, y: (y, y.shape[0]), r"a value that varies with the samples .* at 'output\[1\]'"),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("numbers", [NUMBERS, torch.tensor([1, 0]), torch.tensor([1, 1])])
def test_results_that_cannot_be_joined_raise(kind: str, numbers: Tensor) -> None:
    finish, message = REFUSED[kind]
    model, x = two_domains(Net(finish)), torch.randn(len(numbers), 3, 4, 6)
    planned = bk.plan(model, torch.randn(1, 3, 4, 6), "a")
    bk.set_domain(planned, numbers)
    with pytest.raises(NotImplementedError, match=message):
        planned(x)
    bk.set_domain(planned, "b")
    planned(x)


class Thing:
    def __init__(self, value: Tensor) -> None:
        self.value = value


def plans(function: Callable[[Tensor], Any]) -> MixedPlans:
    """As of a network with code that is run as it is, and so may return anything."""
    batch = MixedBatch(NUMBERS.tolist())
    programs = [
        SimpleNamespace(probe=None, run=lambda inputs, k=k: function(inputs[0] + 10 * k)) for k in batch.numbers
    ]
    return MixedPlans(batch, ["a", "b"], programs, (torch.randn(1, 3),))


def test_one_entry_for_each_sample() -> None:
    x = torch.randn(5, 3)
    got = plans(lambda y: [{"score": one.mean()} for one in y]).run((x,))
    torch.testing.assert_close(torch.stack([one["score"] for one in got]), x.mean(1) + 10 * NUMBERS)
    got = plans(lambda y: {"names": [str(int(one.mean() > 5)) for one in y]}).run((x,))
    assert got == {"names": ["1", "0", "0", "1", "1"]}


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (Thing, "a value of a type that is not known, Thing at 'output'"),
        (lambda y: y.numpy(), "a value of a type that is not known, ndarray"),
        (lambda y: [one for one in y for _ in range(2)], "lengths that vary with the samples"),
        (lambda y: (y, y.max().item()), r"a value that varies with the samples .* at 'output\[1\]'"),
        (lambda y: {int(i): y for i in range(len(y))}, "keys that vary with the samples"),
        (lambda y: y if len(y) == 2 else [y], "values of different types"),
        (lambda y: collections.defaultdict(int, y=y), "a value of a type that is not known, defaultdict"),
    ],
)
def test_results_of_other_shapes_raise(function: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(NotImplementedError, match=message):
        plans(function).run((torch.randn(5, 3),))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding=1)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.conv(x) * scale.view(-1, 1, 1, 1)


@torch.no_grad()
@pytest.mark.parametrize("samples", [1, 2, 4])
def test_inputs_of_each_sample_and_of_the_whole_batch(samples: int) -> None:
    model, x = two_domains(Scaled()), torch.randn(5, 3, 4, 6)
    example = torch.randn(samples, 3, 4, 6)
    planned = bk.plan(model, (example, torch.rand(samples)), "a")
    bk.set_domain(planned, NUMBERS)
    scale = torch.arange(1.0, 6.0)
    torch.testing.assert_close(planned(x, scale), masked(model, x) * scale.view(-1, 1, 1, 1))
    if samples == 1:
        torch.testing.assert_close(planned(x, scale[1:2]), masked(model, x) * 2)
    else:
        with pytest.raises(ValueError, match=r"expected an input with the 5 samples .* got shape \(3,\)"):
            planned(x, scale[:3])


@torch.no_grad()
def test_an_input_with_as_many_entries_by_chance_stays_whole() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 3, padding=1)

        def forward(self, x: Tensor, gain: Tensor) -> Tensor:
            return self.conv(x) * gain.view(1, 5, 1, 1)

    model, x, gain = two_domains(Mixing()), torch.randn(5, 3, 4, 6), torch.arange(1.0, 6.0)
    planned = bk.plan(model, (x[:1], gain), "a")
    bk.set_domain(planned, NUMBERS)
    torch.testing.assert_close(planned(x, gain), masked(model, x) * gain.view(1, 5, 1, 1))


@torch.no_grad()
def test_plans_are_probed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = bk.plan(two_domains(Net()), torch.randn(1, 3, 4, 6), "a")
    sizes: list[int] = []
    run = Program.run
    monkeypatch.setattr(Program, "run", lambda self, inputs: sizes.append(len(inputs[0])) or run(self, inputs))
    for shape in ((5, 3, 4, 6), (5, 3, 8, 8)):
        bk.set_domain(planned, NUMBERS)
        planned(torch.randn(shape))
    # In the first batch, after the check of the second plan, which counts bytes in a run of its own.
    assert sizes == [1, 1, 3, 2, 3, 2, 2, 3, 2, 3]
    assert all(program.probe[0].is_meta for program, _ in planned._programs.values())


@torch.no_grad()
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_samples_are_sorted_once_and_sorted_ones_not_copied(
    layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = two_domains(Net())
    planned = bk.plan(model, torch.randn(1, 3, 4, 6), "a")
    given: list[Tensor] = []
    run = Program.run
    x = torch.randn(5, 3, 4, 6).contiguous(memory_format=layout)
    for numbers in (torch.tensor([0, 0, 1, 1, 1]), NUMBERS):
        bk.set_domain(planned, numbers)
        planned(x)
        given.clear()
        monkeypatch.setattr(Program, "run", lambda self, inputs: given.append(inputs[0]) or run(self, inputs))
        y = planned(x)
        monkeypatch.undo()
        # One tensor for all domains: the caller's if its samples are sorted.
        storages = {part.untyped_storage().data_ptr() for part in given}
        assert (storages == {x.untyped_storage().data_ptr()}) == (numbers is not NUMBERS)
        assert len(storages) == 1
        assert all(part.is_contiguous(memory_format=layout) for part in given)
        assert torch.allclose(y, masked(model, x, numbers), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("heads", [None, {"a": 3, "b": 2}])
def test_empty_batches(heads: dict[str, int] | None) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.Flatten())
    model = bk.nn.switch_(model.append(nn.Linear(16, 3)), ["a", "b"], heads=heads, head="5" if heads else None).eval()
    planned = bk.plan(model, torch.randn(1, 3, 4, 4), "b")
    bk.set_domain(planned, torch.tensor([], dtype=torch.int64))
    assert planned(torch.randn(0, 3, 4, 4)).shape == (0, 3)
    with pytest.raises(ValueError, match="expected an input with the 0 samples"):
        planned(torch.randn(1, 3, 4, 4))
    bk.set_domain(planned, torch.tensor([0]))
    assert planned(torch.randn(1, 3, 4, 4)).shape == (1, 3)


@torch.no_grad()
def test_a_planned_part_follows_its_model() -> None:
    x = torch.randn(5, 3, 4, 6)
    part = two_domains(Net())
    planned = bk.plan(part, x[:1], "a")
    model = nn.Sequential(planned, nn.ReLU())
    assert bk.domain_names(model) == ["a", "b"]
    bk.set_domain(model, "b")
    assert planned.domain == "b"
    torch.testing.assert_close(model(x), masked(part, x, torch.ones(5, dtype=torch.int64)).relu())
    bk.set_domain(model, NUMBERS)
    torch.testing.assert_close(model(x), masked(part, x).relu())
    bk.set_domain(model, "a")
    torch.testing.assert_close(model(x), masked(part, x, torch.zeros(5, dtype=torch.int64)).relu())
    with pytest.raises(ValueError, match=r"set_domain\(\): expected `name` to be one of \['a', 'b'\], got 'z'"):
        bk.set_domain(model, "z")
    assert planned.domain == "a"


@torch.no_grad()
def test_a_part_that_orders_its_domains_otherwise_has_no_numbers() -> None:
    x = torch.randn(5, 3, 4, 6)
    part = bk.swap_(Net().eval())
    bk.attach_(part, {"b": {"conv": bk.ChannelLists([1])}, "a": {"conv": bk.ChannelLists([0])}})
    first = bk.swap_(nn.Sequential(nn.Conv2d(3, 3, 1)).eval())
    bk.attach_(first, {"a": {"0": bk.ChannelLists([0])}, "b": {"0": bk.ChannelLists([1])}})
    model = nn.Sequential(first, bk.plan(part, x[:1], "a"))
    with pytest.raises(ValueError, match="expected the layers of `model` to have their domains in one order"):
        bk.set_domain(model, NUMBERS)
    bk.set_domain(model, "b")
    torch.testing.assert_close(model(x), masked(part, first(x), torch.ones(5, dtype=torch.int64)))


@torch.no_grad()
def test_the_plan_and_its_model_have_domains_of_their_own() -> None:
    model, x = two_domains(Net()), torch.randn(5, 3, 4, 6)
    planned = bk.plan(model, x[:1], "a")
    bk.set_domain(planned, NUMBERS)
    bk.set_domain(model, "b")
    torch.testing.assert_close(planned(x), masked(model, x))
    torch.testing.assert_close(model(x), masked(model, x, torch.ones(5, dtype=torch.int64)))
    bk.set_domain(model, NUMBERS.flip(0))
    torch.testing.assert_close(planned(x), masked(model, x))
    assert copy.deepcopy(planned).domain == "a"


@torch.no_grad()
def test_lists_of_images_raise() -> None:
    class Stacked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 3, padding=1)

        def forward(self, x: Tensor, rest: list[Tensor]) -> Tensor:
            return self.conv(x) + rest[0]

    x = torch.randn(2, 3, 4, 6)
    planned = bk.plan(two_domains(Stacked()), (x, [torch.zeros(1)]), "a")
    bk.set_domain(planned, torch.tensor([1, 0]))
    with pytest.raises(NotImplementedError, match="expected the inputs of a mixed batch to be tensors or dictionaries"):
        planned(x, [torch.zeros(1)])


@torch.no_grad()
@pytest.mark.parametrize(
    "finish",
    [
        lambda net, y: y.flip(0),
        lambda net, y: y - y.mean(0),
        lambda net, y: y.roll(1, 0),
        lambda net, y: {"a": y.softmax(0)},
        lambda net, y: y.flip(0).argmax(1),
    ],
    ids=["flip", "mean", "roll", "softmax", "argmax"],
)
def test_networks_that_mix_samples_raise(finish: Callable[[Any, Tensor], Any]) -> None:
    model, x = two_domains(Net(finish)), torch.randn(len(NUMBERS), 3, 4, 6)
    planned = bk.plan(model, x, "a")
    bk.set_domain(planned, NUMBERS)
    with pytest.raises(NotImplementedError, match="depend on the other samples of the batch"):
        planned(x)
