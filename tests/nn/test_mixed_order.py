"""Samples of a mixed batch keep their places: whatever a model does with them and returns is as for one domain."""

from __future__ import annotations

import collections
import copy
import dataclasses
import pickle
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bap_kernels as bk
from bap_kernels.nn import mixed
from bap_kernels.nn.mixed import MixedBatch

# As many samples as an image has channels; the middle sample is not its own mirror image.
NUMBERS = torch.tensor([1, 0, 0])


def masked(conv: nn.Conv2d, x: Tensor, numbers: Tensor = NUMBERS) -> Tensor:
    """What the layer means: domain 0 reads channel 0 and domain 1 channel 1."""
    one = torch.zeros(len(x), x.shape[1], 1, 1).double()
    one[torch.arange(len(x)), numbers] = 1
    weight, bias = conv.weight.double(), None if conv.bias is None else conv.bias.double()
    return F.conv2d(x.double() * one, weight, bias, conv.stride, conv.padding).float()


def two_domains(model: nn.Module, name: str = "conv") -> nn.Module:
    lists = {"a": {name: bk.ChannelLists([0])}, "b": {name: bk.ChannelLists([1])}}
    return bk.attach_(bk.swap_(model.eval()), lists)


class Net(nn.Module):
    """A convolution, and a function that turns its result into what the model returns."""

    def __init__(self, finish: Callable[[Tensor], Any] = lambda y: y) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.finish = finish

    def forward(self, x: Any) -> Any:
        return self.finish(self.conv(torch.stack(x) if isinstance(x, list) else x))


@dataclasses.dataclass
class Record:
    features: Tensor
    count: int


class Thing:
    def __init__(self, value: Tensor) -> None:
        self.value = value


class Pair(NamedTuple):
    first: Tensor
    second: Any


class ModelOutput(collections.OrderedDict):
    """As of the transformers library: a dictionary with attributes."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


# What a model may return, and how the samples' results are found in it, with the batch first.
RESULTS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "dataclass": (lambda y: Record(y, len(y)), lambda r: r.features),
    "object": (Thing, lambda r: r.value),
    "namedtuple": (lambda y: Pair(y.sum(), [y]), lambda r: r.second[0]),
    "model output": (lambda y: ModelOutput(logits=y), lambda r: r.logits),
    "list of samples": (lambda y: list(y), torch.stack),
    "list of dictionaries": (lambda y: [{"y": one} for one in y], lambda r: torch.stack([one["y"] for one in r])),
    "dictionary of lists": (lambda y: {"masks": list(y.unbind())}, lambda r: torch.stack(r["masks"])),
    "generator": (lambda y: (one for one in y), lambda r: torch.stack(list(r))),
    "numpy": (lambda y: y.detach().numpy(), torch.from_numpy),
    "numbers": (lambda y: y.mean((1, 2, 3)).tolist(), lambda r: torch.tensor(r)[:, None, None, None]),
    "channels first": (lambda y: y.transpose(0, 1), lambda r: r.transpose(0, 1)),
    "pixels first": (lambda y: y.permute(2, 3, 0, 1).contiguous(), lambda r: r.permute(2, 3, 0, 1)),
    "flat": (lambda y: y.flatten(), lambda r: r.view(3, 3, 5, 5)),
    "sparse": (lambda y: y.to_sparse(), lambda r: r.to_dense()),
    "nested": (
        lambda y: torch.nested.nested_tensor(list(y), layout=torch.strided),
        lambda r: torch.stack(list(r.unbind())),
    ),
}


@pytest.mark.parametrize("kind", RESULTS)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_results_of_any_kind_are_in_the_callers_order(kind: str) -> None:
    finish, found = RESULTS[kind]
    torch.manual_seed(0)
    model, x = two_domains(Net(finish)), torch.randn(3, 3, 5, 5)
    bk.set_domain(model, NUMBERS)
    got, want = found(model(x)), masked(model.conv, x)
    if kind == "numbers":
        want = want.mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_tensors_that_are_no_batch_stay_as_they_are() -> None:
    class Anchors(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.register_buffer("table", torch.arange(12.0).view(3, 4))

        def forward(self, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            y = self.conv(x * scale.view(1, 3, 1, 1))
            # As many entries as there are samples, by chance.
            return y, self.table, y.mean((0, 2, 3))

    model, x = two_domains(Anchors()), torch.randn(3, 3, 5, 5)
    bk.set_domain(model, NUMBERS)
    scale = torch.tensor([1.0, 2.0, 3.0])
    y, table, mean = model(x, scale=scale)
    want = masked(model.conv, x * scale.view(1, 3, 1, 1))
    torch.testing.assert_close(y, want)
    assert table is model.table
    torch.testing.assert_close(mean, want.mean((0, 2, 3)))


def test_a_list_of_images_keeps_the_channels_of_each() -> None:
    model, x = two_domains(Net()), torch.randn(3, 3, 5, 5)
    bk.set_domain(model, NUMBERS)
    torch.testing.assert_close(model(list(x)), masked(model.conv, x))


def test_hooks_and_parts_see_the_callers_order() -> None:
    model, x = two_domains(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()), "0"), torch.randn(3, 3, 5, 5)
    bk.set_domain(model, NUMBERS)
    seen = []
    model[0].register_forward_hook(lambda layer, inputs, output: seen.append((inputs[0], output)))
    model(x)
    assert seen[0][0] is x
    torch.testing.assert_close(seen[0][1], masked(model[0], x))
    torch.testing.assert_close(model[0](x), masked(model[0], x))
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_an_error_inside_leaves_no_trace() -> None:
    def finish(y: Tensor) -> Tensor:
        if y.sum() > 1e6:
            raise KeyError("too large")
        return y

    model, x = two_domains(Net(finish)), torch.randn(3, 3, 5, 5)
    bk.set_domain(model, NUMBERS)
    with torch.no_grad():
        model.conv.bias.fill_(1e6)
    with pytest.raises(KeyError):
        model(x)
    with torch.no_grad():
        model.conv.bias.fill_(0.5)
    torch.testing.assert_close(model(x), masked(model.conv, x))


def test_a_name_ends_the_batch_of_a_part_and_of_the_whole() -> None:
    model = two_domains(nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1))), "0.0")
    layer, x = model[0][0], torch.randn(3, 3, 5, 5)
    every = {name: masked(layer, x, torch.full((3,), number)) for number, name in enumerate("ab")}
    for outer, inner in ((model, model[0]), (model[0], model), (model, layer), (layer, model)):
        bk.set_domain(model, "a")
        bk.set_domain(inner, NUMBERS)
        torch.testing.assert_close(model(x), masked(layer, x))
        bk.set_domain(outer, "b")
        torch.testing.assert_close(model(x), every["b"])
        bk.set_domain(inner, NUMBERS)
        bk.set_domain(outer, NUMBERS.flip(0))
        torch.testing.assert_close(model(x), masked(layer, x, NUMBERS.flip(0)))
        bk.set_domain(outer, None)
        assert layer.channels.in_index is None
        torch.testing.assert_close(model(x[:2]), layer._conv_forward(x[:2], layer.weight, layer.bias))
    bk.set_domain(model, NUMBERS)
    layer.set_domain("a")
    torch.testing.assert_close(model(x), every["a"])
    bk.set_domain(model, NUMBERS)
    with pytest.raises(ValueError, match="expected `name` to be one of"):
        bk.set_domain(model, "z")
    torch.testing.assert_close(model(x), masked(layer, x))


def test_two_parts_in_batches_of_their_own() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))
    bk.attach_(bk.swap_(model.eval()), {n: {k: bk.ChannelLists([i]) for k in "01"} for i, n in enumerate("ab")})
    bk.set_domain(model[0], NUMBERS)
    bk.set_domain(model[1], NUMBERS.flip(0))
    x = torch.randn(3, 3, 5, 5)
    torch.testing.assert_close(model(x), masked(model[1], masked(model[0], x), NUMBERS.flip(0)))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_in_the_batch_and_leave_it_alone(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model = two_domains(nn.Sequential(nn.Conv2d(3, 3, 1)), "0")
    bk.set_domain(model, NUMBERS)
    other, x = duplicate(model), torch.randn(3, 3, 5, 5)
    torch.testing.assert_close(other(x), masked(model[0], x))
    bk.set_domain(other, "a")
    torch.testing.assert_close(other(x), masked(model[0], x, torch.zeros(3, dtype=torch.int64)))
    torch.testing.assert_close(model(x), masked(model[0], x))


def test_threads_share_a_batch() -> None:
    model, x = two_domains(Net()), torch.randn(3, 3, 5, 5)
    bk.set_domain(model, NUMBERS)
    want, results = masked(model.conv, x), []

    def call() -> None:
        with torch.no_grad():
            results.extend(model(x) for _ in range(50))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 200
    for got in results:
        torch.testing.assert_close(got, want)


def everything() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.Flatten())
    model.append(nn.Linear(4 * 9, 3))
    return bk.nn.switch_(model, ["a", "b"], heads={"a": 3, "b": 2}, head="5")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("make", [everything, lambda: two_domains(Net(lambda y: y.flatten(1)))])
def test_empty_batches(make: Callable[[], nn.Module], training: bool) -> None:
    model = make()
    bk.set_domain(model, torch.tensor([], dtype=torch.int64))
    model.train(training)
    for layer in model.modules():
        if isinstance(layer, bk.nn.DomainBatchNorm2d):
            # Batches of no sample have no statistics.
            layer.eval()
    x = torch.randn(0, 3, 5, 5)
    y = model(x)
    assert y.shape == (0, 3 if isinstance(model, nn.Sequential) else 75)
    if training:
        y.sum().backward()
    with pytest.raises(ValueError, match="expected an input with the 0 samples of the mixed batch"):
        model(torch.randn(1, 3, 5, 5))


def test_layers_without_a_common_domain() -> None:
    model = nn.Sequential(bk.nn.DomainBatchNorm2d(3, ["a"]), bk.nn.DomainBatchNorm2d(3, ["b"]))
    for numbers in ([], [0]):
        with pytest.raises(ValueError, match="expected layers that share a domain, got none"):
            bk.set_domain(model, torch.tensor(numbers, dtype=torch.int64))


@pytest.fixture(params=["sorted", "neighbours"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(mixed, "_better_sorted", lambda *args: request.param == "sorted")
    return request.param


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_sorted_and_unsorted_batches_agree(way: str, layout: torch.memory_format) -> None:
    numbers = torch.tensor([1, 1, 0, 1, 0, 0, 1])
    model, x = two_domains(Net()), torch.randn(7, 3, 6, 5).contiguous(memory_format=layout)
    bk.set_domain(model, numbers)
    with torch.no_grad():
        y = model(x)
    torch.testing.assert_close(y, masked(model.conv, x, numbers))
    assert y.is_contiguous(memory_format=layout)


def test_batches_are_sorted_where_that_moves_less() -> None:
    batch = MixedBatch([0, 1] * 8)
    deep, small = nn.Conv2d(512, 512, 3, stride=2), torch.empty(16, 512, 14, 14)
    assert mixed._better_sorted(batch, deep, small)
    assert not mixed._better_sorted(batch, deep, small.contiguous(memory_format=torch.channels_last))
    assert mixed._better_sorted(batch, deep, small[:, :, :7, :7].contiguous(memory_format=torch.channels_last))
    assert not mixed._better_sorted(batch, nn.Conv2d(64, 64, 3, stride=2), torch.empty(16, 64, 56, 56))
    # Winograd kernels, which compute a domain's samples together.
    assert not mixed._better_sorted(batch, nn.Conv2d(512, 512, 3), small)
    assert mixed._better_sorted(batch, nn.Conv2d(512, 512, 3), small.bfloat16())


def test_compiled() -> None:
    model = everything().eval()
    x = torch.randn(3, 3, 5, 5)
    bk.set_domain(model, NUMBERS)
    want = model(x)
    got = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(got, want)
    for sample, number, row in zip(x, NUMBERS.tolist(), want, strict=True):
        bk.set_domain(model, "ab"[number])
        alone = model(sample[None])[0]
        torch.testing.assert_close(row, F.pad(alone, (0, 3 - len(alone)), value=-torch.inf))


@pytest.mark.parametrize("freeze", ["weight", "bias", "none", "both"])
def test_frozen_parameters(freeze: str) -> None:
    for model in (two_domains(Net()), bk.nn.switch_(Net(), ["a", "b"]).eval()):
        for name in ("weight", "bias") if freeze == "both" else () if freeze == "none" else (freeze,):
            getattr(model.conv, name).requires_grad_(False)
        bk.set_domain(model, NUMBERS)
        y = model(torch.randn(3, 3, 5, 5))
        assert y.requires_grad == (freeze != "both")
