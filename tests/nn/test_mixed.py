"""Batches whose samples belong to several domains: every sample gets what it gets alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
import torch.utils.flop_counter
from torch import Tensor, nn

import bap_kernels as bk
from bap_kernels import _C
from bap_kernels.nn.mixed import MixedBatch
from bap_kernels.testing import lay_out

DOMAINS = ["birds", "cars", "signs"]
NUMBERS = torch.tensor([2, 0, 2, 1, 0, 2, 2])
op = torch.ops.bap_kernels._gathered_conv2d_mixed


@pytest.fixture(autouse=True)
def _same_number_of_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Branchy(nn.Module):
    """Strides, a residual sum, a 1x1 shortcut, batch norm, pooling and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(12, 16, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.second = nn.Conv2d(16, 20, 3, padding="same")
        self.shortcut = nn.Conv2d(16, 20, 1)
        self.fc = nn.Linear(20, 5)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        return self.fc((self.second(x) + scale * self.shortcut(x)).mean((2, 3)))


def gathered() -> nn.Module:
    model = bk.swap_(Branchy())
    return bk.attach_(model, bk.ChannelTable.random(model, DOMAINS, 0.5, seed=3))


def switched(heads: dict[str, int] | None = None) -> nn.Module:
    torch.manual_seed(5)
    model = bk.nn.switch_(Branchy(), DOMAINS, heads=heads)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("score"):
                parameter.uniform_(-0.01, 0.02)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.uniform_(0.5, 1.5)
    return model


def alone(model: nn.Module, x: Tensor, numbers: Tensor) -> list[Tensor]:
    """The result of every sample as a batch of its own, under its domain."""
    results = []
    for sample, number in zip(x, numbers.tolist(), strict=True):
        bk.set_domain(model, DOMAINS[number])
        results.append(model(sample.unsqueeze(0))[0])
    return results


@pytest.mark.parametrize("numbers", [NUMBERS, torch.tensor([1, 1]), torch.tensor([0, 1, 2]), torch.tensor([2])])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("make", [gathered, switched])
def test_every_sample_gets_what_it_gets_alone(
    make: Callable[[], nn.Module], layout: str, numbers: Tensor, backend: str
) -> None:
    torch.manual_seed(1)
    model = make().eval()
    x = lay_out(torch.randn(len(numbers), 12, 9, 8), layout)
    with torch.no_grad(), bk.use_backend(backend):
        expected = torch.stack(alone(model, x, numbers))
        bk.set_domain(model, numbers)
        torch.testing.assert_close(model(x), expected)
        torch.testing.assert_close(model(x, scale=1.0), expected)


@pytest.mark.skipif(bool(_C.unsupported_reason("native")), reason=str(_C.unsupported_reason("native")))
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_one_kernel_for_all_domains_gives_the_same_bits(layout: torch.memory_format, threads: int) -> None:
    torch.set_num_threads(threads)
    x = torch.randn(9, 40, 17, 19).contiguous(memory_format=layout)
    weight, bias = torch.randn(33, 40, 3, 3), torch.randn(33)
    lists = [torch.randperm(40)[:count].sort().values.int() for count in (20, 1, 39)]
    lists = [lists[0], None, lists[1], lists[2]]
    options = ((2, 1), (1, 0, 2, 1), (1, 2))
    with bk.use_backend("native"):
        mixed = op(x, weight, bias, lists, [4, 2, 0, 3], *options)
        parts = [
            torch.ops.bap_kernels.gathered_conv2d(part, weight, bias, one, None, *options, 1)
            for part, one in zip(x.split([4, 2, 0, 3]), lists, strict=True)
        ]
    assert torch.equal(mixed, torch.cat(parts))
    assert mixed.is_contiguous(memory_format=layout)


@pytest.mark.skipif(bool(_C.unsupported_reason("native")), reason=str(_C.unsupported_reason("native")))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(1, (1, 1), 0), (1, (1, 1), 1), (1, (2, 2), 0), (3, (2, 1), 1)]
)
def test_samples_of_one_list_lie_anywhere(
    kernel: int, stride: tuple[int, int], padding: int, layout: torch.memory_format, dtype: torch.dtype
) -> None:
    torch.manual_seed(2)
    # Every second image of a larger batch.
    x = torch.randn(22, 21, 9, 7, dtype=dtype).contiguous(memory_format=layout)[::2]
    weight = torch.randn(35, 21, kernel, kernel, dtype=dtype)
    first, second = (torch.randperm(21)[:count].int() for count in (8, 13))
    lists, counts = [first, second, first.clone(), None, second, first, None], [1, 3, 2, 1, 1, 2, 1]
    options = (stride, (padding,) * 4, (1, 1))
    with bk.use_backend("native"):
        y = op(x, weight, None, lists, counts, *options)
        parts = [
            torch.ops.bap_kernels.gathered_conv2d(part, weight, None, one, None, *options, 1)
            for part, one in zip(x.split(counts), lists, strict=True)
        ]
    assert torch.equal(y, torch.cat(parts))
    for part, listed, result in zip(x.split(counts), lists, y.split(counts), strict=True):
        channels = slice(None) if listed is None else listed.long()
        expected = F.conv2d(part[:, channels].double(), weight[:, channels].double(), None, stride, padding)
        torch.testing.assert_close(result.double(), expected, rtol=0.02 if dtype == torch.bfloat16 else 1e-4, atol=1e-2)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("listed", [None, [5, 0, 3], []])
def test_domains_with_one_list_are_one_call(listed: list[int] | None, layout: torch.memory_format) -> None:
    x = torch.randn(6, 7, 8, 9).contiguous(memory_format=layout)
    weight, bias = torch.randn(5, 7, 3, 3), torch.randn(5)
    lists = [None if listed is None else torch.tensor(listed, dtype=torch.int32) for _ in range(3)]
    y = op(x, weight, bias, lists, [3, 1, 2], (1, 1), (1, 1, 1, 1), (1, 1))
    # Zeros in place of channels that are not listed: F.conv2d takes no input without channels.
    mask = torch.zeros(7, 1, 1, dtype=torch.float64)
    mask[slice(None) if listed is None else listed] = 1
    expected = F.conv2d(x.double() * mask, weight.double(), bias.double(), padding=1)
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
    assert y.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_op(dtype: torch.dtype) -> None:
    x, weight = torch.randn(5, 6, 7, 8, dtype=dtype), torch.randn(4, 6, 3, 3, dtype=dtype)
    lists = [torch.tensor([1, 4], dtype=torch.int32), torch.tensor([], dtype=torch.int32), None]
    args = (x, weight, None, lists, [2, 1, 2], (1, 1), (1, 1, 1, 1), (1, 1))
    torch.library.opcheck(op.default, args, test_utils=("test_schema", "test_faketensor"))
    y = op(*args)
    assert not y[2].any()
    torch.testing.assert_close(y[3:], F.conv2d(x[3:].double(), weight.double(), padding=1).to(dtype))
    expected = F.conv2d(x[:2, [1, 4]].double(), weight[:, [1, 4]].double(), padding=1)
    torch.testing.assert_close(y[:2], expected.to(dtype))
    assert op(x[:0], weight, None, [], [], *args[5:]).shape == (0, 4, 7, 8)


def test_nan_in_channels_that_are_off_reaches_no_sample() -> None:
    model = bk.swap_(nn.Sequential(nn.Conv2d(8, 6, 3)))
    lists = {"birds": {"0": bk.ChannelLists([0, 1])}, "cars": {"0": bk.ChannelLists([2, 5])}}
    bk.set_domain(bk.attach_(model, lists).eval(), torch.tensor([1, 0, 1]))
    x = torch.randn(3, 8, 6, 6)
    x[0::2, [0, 1, 3, 4, 6, 7]] = torch.nan
    x[1, 2:] = torch.inf
    assert bool(model(x).isfinite().all())


def test_training_trains_every_domain() -> None:
    model = switched().train()
    x = torch.randn(7, 12, 9, 8)
    copies = {number: copy.deepcopy(model) for number in range(3)}
    bk.set_domain(model, NUMBERS)
    y = model(x)
    y.square().sum().backward()
    for number, one in copies.items():
        bk.set_domain(one, DOMAINS[number])
        part = one(x[number == NUMBERS])
        torch.testing.assert_close(y[number == NUMBERS], part)
        part.square().sum().backward()
        own = dict(bk.nn.domain_parameters(one, DOMAINS[number]))
        for name, parameter in bk.nn.domain_parameters(model, DOMAINS[number]):
            torch.testing.assert_close(parameter.grad, own[name].grad, rtol=1e-4, atol=1e-4)
        norm, expected = (m.norm.domains[DOMAINS[number]].running_mean for m in (model, one))
        torch.testing.assert_close(norm, expected)
    total = sum(one.first.weight.grad for one in copies.values())
    torch.testing.assert_close(model.first.weight.grad, total, rtol=1e-4, atol=1e-3)


def test_gathered_layers_train_too() -> None:
    model = gathered().train()
    x = torch.randn(7, 12, 9, 8, requires_grad=True)
    bk.set_domain(model, NUMBERS)
    model.eval()(x).sum().backward()
    used = {number: model.first.lists[DOMAINS[number]].in_index.tolist() for number in range(3)}
    for sample, number in enumerate(NUMBERS.tolist()):
        got = x.grad[sample].abs().sum((1, 2)).nonzero().flatten().tolist()
        assert got == used[number]


def test_mixed_batch_pads_classes_with_minus_infinity() -> None:
    model = switched(heads={"birds": 4, "cars": 7, "signs": 2}).eval()
    x = torch.randn(7, 12, 9, 8)
    with torch.no_grad():
        expected = alone(model, x, NUMBERS)
        bk.set_domain(model, NUMBERS)
        y = model(x)
    assert y.shape == (7, 7)
    for row, want in zip(y, expected, strict=True):
        torch.testing.assert_close(row[: len(want)], want)
        assert bool((row[len(want) :] == -torch.inf).all())
        torch.testing.assert_close(row.softmax(0)[: len(want)], want.softmax(0))


def test_autocast_obeys_the_users_dtype() -> None:
    model = gathered().eval()
    x = torch.randn(7, 12, 9, 8)
    bk.set_domain(model, NUMBERS)
    with torch.no_grad():
        full = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            half = model(x)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), full, rtol=0.1, atol=0.1)


def test_masked_layers_keep_the_full_width() -> None:
    model = bk.swap_(nn.Sequential(nn.Conv2d(8, 6, 3)), layer_type=bk.nn.MaskedConv2d)
    lists = {"birds": {"0": bk.ChannelLists([0, 1], [2])}, "cars": {"0": bk.ChannelLists([2, 5], [0, 4])}}
    bk.set_domain(bk.attach_(model, lists).eval(), torch.tensor([1, 0]))
    y = model(torch.randn(2, 8, 6, 6))
    assert y[0].abs().sum((1, 2)).nonzero().flatten().tolist() == [0, 4]
    assert y[1].abs().sum((1, 2)).nonzero().flatten().tolist() == [2]


def test_different_widths_are_refused() -> None:
    model = bk.swap_(nn.Sequential(nn.Conv2d(8, 6, 3)))
    lists = {"birds": {"0": bk.ChannelLists(None, [2])}, "cars": {"0": bk.ChannelLists(None, [0, 4])}}
    bk.set_domain(bk.attach_(model, lists).eval(), torch.tensor([1, 0]))
    with pytest.raises(
        ValueError, match=r"expected all domains of a mixed batch to give as many channels, got \[1, 2\]"
    ):
        model(torch.randn(2, 8, 6, 6))


def test_one_domain_again_and_numbers_again() -> None:
    model = gathered().eval()
    x = torch.randn(7, 12, 9, 8)
    with torch.no_grad():
        bk.set_domain(model, "cars")
        before = model(x)
        bk.set_domain(model, NUMBERS)
        model(x)
        bk.set_domain(model, NUMBERS.flip(0))
        flipped = model(x.flip(0)).flip(0)
        bk.set_domain(model, NUMBERS)
        assert torch.equal(model(x), flipped)
        bk.set_domain(model, "cars")
        assert torch.equal(model(x), before)
        bk.set_domain(model, None)
        assert model.first.extra_repr().count("reads") == 0
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_results_in_containers_and_copies_of_the_model() -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 4, 1)

        def forward(self, batch: dict[str, Tensor]) -> dict[str, list[Tensor]]:
            y = self.conv(batch["image"])
            return {"features": [y, y.mean((2, 3))], "total": y.sum()}

    model = bk.swap_(Several())
    bk.attach_(model, bk.ChannelTable.random(model, DOMAINS, 0.5, seed=1)).eval()
    x = torch.randn(7, 8, 3, 3)
    bk.set_domain(model, NUMBERS)
    y = model({"image": x})
    twin = copy.deepcopy(model)
    assert torch.equal(twin({"image": x})["features"][1], y["features"][1])
    bk.set_domain(twin, "birds")
    assert not twin._forward_hooks
    assert torch.equal(model({"image": x})["features"][0], y["features"][0])
    torch.testing.assert_close(y["features"][0].mean((2, 3)), y["features"][1])
    bk.set_domain(model, "signs")
    expected = model({"image": x[:1]})["features"][0]
    torch.testing.assert_close(y["features"][0][:1], expected)


@pytest.mark.parametrize(
    ("numbers", "error", "message"),
    [
        (torch.tensor([0.0, 1.0]), TypeError, "expected `name` to be int64 domain numbers, got torch.float32"),
        (torch.tensor([[0, 1]]), ValueError, r"expected `name` to be 1-D, .* got shape \(1, 2\)"),
        (torch.tensor([0, 3]), IndexError, "expected `name` to hold domain numbers from 0 to 2, .* got 3"),
        (torch.tensor([-1, 0]), IndexError, "got -1"),
    ],
)
def test_wrong_numbers(numbers: Tensor, error: type[Exception], message: str) -> None:
    model = gathered().eval()
    bk.set_domain(model, "cars")
    with pytest.raises(error, match=message):
        bk.set_domain(model, numbers)
    assert model.first.channels is model.first.lists["cars"]
    assert not model._forward_hooks


@pytest.mark.parametrize("make", [gathered, switched])
@pytest.mark.parametrize("shape", [(6, 12, 9, 8), (0, 12, 9, 8), (12, 9, 8)])
def test_batches_of_another_size_are_refused(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    model = make().eval()
    bk.set_domain(model, NUMBERS)
    with pytest.raises(ValueError, match="expected an input with the 7 samples of the mixed batch, got shape"):
        model(torch.randn(shape))
    assert model(torch.randn(7, 12, 9, 8)).shape == (7, 5)


def test_one_image_is_no_batch_of_as_many_samples_as_it_has_channels() -> None:
    for layer in (bk.nn.GatheredConv2d(3, 4, 1), bk.nn.SwitchedConv2d(3, 4, 1, domains=["a", "b"])):
        model = nn.Sequential(layer)
        if isinstance(layer, bk.nn.GatheredConv2d):
            bk.attach_(model, {"a": {"0": bk.ChannelLists([0])}, "b": {"0": bk.ChannelLists([1])}})
        bk.set_domain(model.eval(), torch.tensor([1, 0, 1]))
        with pytest.raises(ValueError, match=r"expected an input with the 3 samples .* got shape \(3, 5, 5\)"):
            model(torch.randn(3, 5, 5))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"counts": [2]}, ValueError, "expected `counts` to have one entry for each of the 2 lists"),
        ({"counts": [2, 2]}, ValueError, "expected `counts` to add up to the batch of 5, got 4"),
        ({"counts": [6, -1]}, ValueError, "expected `counts` to be at least 0"),
        ({"lists": [torch.tensor([9], dtype=torch.int32), None]}, IndexError, "channel numbers from 0 to 5, got 9"),
        ({"lists": [torch.tensor([1]), None]}, TypeError, "expected `in_index` to be an int32 list, got Long"),
    ],
)
def test_errors_of_the_op(change: dict[str, list], error: type[Exception], message: str) -> None:
    lists, counts = change.get("lists", [None, None]), change.get("counts", [2, 3])
    with pytest.raises(error, match=message):
        op(torch.randn(5, 6, 7, 8), torch.randn(4, 6, 3, 3), None, lists, counts, (1, 1), (1, 1, 1, 1), (1, 1))


def test_the_op_serves_inference_only() -> None:
    weight = torch.randn(4, 6, 3, 3, requires_grad=True)
    with pytest.raises(NotImplementedError, match="expected tensors that need no gradient"):
        op(torch.randn(5, 6, 7, 8), weight, None, [None], [5], (1, 1), (1, 1, 1, 1), (1, 1))


def test_flops_count_the_channels_of_each_domain() -> None:
    lists = [torch.tensor([0, 3, 5], dtype=torch.int32), None]
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        op(torch.randn(5, 6, 7, 8), torch.randn(4, 6, 3, 3), None, lists, [2, 3], (1, 1), (1, 1, 1, 1), (1, 1))
    assert counter.get_total_flops() == 2 * (2 * 3 + 3 * 6) * 4 * 7 * 8 * 9


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("make", [gathered, switched, lambda: switched({"birds": 4, "cars": 7, "signs": 2})])
def test_planned_networks_take_mixed_batches(make: Callable[[], nn.Module], layout: str) -> None:
    model = make().eval()
    x = lay_out(torch.randn(7, 12, 9, 8), layout)
    with torch.no_grad():
        expected = alone(model, x, NUMBERS)
        planned = bk.plan(model, x[:2], "cars")
        bk.set_domain(planned, NUMBERS)
        y = planned(x)
        for row, want in zip(y, expected, strict=True):
            torch.testing.assert_close(row[: len(want)], want, rtol=1e-4, atol=1e-4)
            assert bool((row[len(want) :] == -torch.inf).all())
        with pytest.raises(ValueError, match="expected an input with the 7 samples"):
            planned(x[:2])
        bk.set_domain(planned, "signs")
        torch.testing.assert_close(planned(x[:1])[0], expected[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["domain_index", "order", "inverse"])
def test_indices_are_copied_to_a_device_once(name: str) -> None:
    batch = MixedBatch([1, 0, 1])
    assert batch.on(name, torch.device("cpu")) is getattr(batch, name)
    there = torch.device("meta")
    assert batch.on(name, there).device == there
    assert batch.on(name, there) is batch.on(name, there)
